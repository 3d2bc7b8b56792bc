"""How long a step takes, as far as that decides between layouts: pure arithmetic, importable without torch."""

from finetune_trainer.memory import Layout, ModelShape

#: The unit is the time of one token's forward pass through the linear layers of the model, the backward pass of a
#: frozen base taking as long again. What a pass costs whatever its tokens, measured on an H200 as the difference
#: between passes of 2,048 and of 8,192 tokens.
_EACH_PASS = 480
#: The same where layers are not compiled and their many small kernels are started one by one.
_EACH_PASS_EAGER = 1000
#: Dequantizing 4-bit weights of all layers once: 2.5 bytes a weight of memory traffic against 2 operations a token.
_DEQUANTIZING = 230


def cost(rows: int, layout: Layout, shape: ModelShape, bits: int) -> float:
    """Relative time of an optimizer step of `rows` sequences per process; smaller is faster."""
    passes = rows // layout.micro_batch
    through = 2 + layout.recomputed / shape.layers
    dequantized = 1 - layout.cached / shape.layers if bits == 4 else 0.0
    start = _EACH_PASS if layout.compiled else _EACH_PASS_EAGER
    return passes * (start + through * (layout.tokens + dequantized * _DEQUANTIZING))
