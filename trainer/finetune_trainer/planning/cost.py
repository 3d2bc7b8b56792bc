"""Estimate the relative time of a step, to choose between layouts. Pure, importable without torch.

The unit is the time of one token's forward pass through the linear layers of the model, the backward pass of a frozen
base taking as long again. Constants are fitted to Mistral-7B on an H100 (docs/performance.md).
"""

from dataclasses import replace

from finetune_trainer.planning.memory import Layout
from finetune_trainer.planning.model_shape import ModelShape
from finetune_trainer.planning.shapes import step_of

#: Fixed cost of a pass on the GPU: small products use it less well.
_EACH_PASS = 700
#: Dequantizing 4-bit weights of all layers once: 2.5 bytes a weight of memory traffic against 2 operations a token.
_DEQUANTIZING = 500
#: Reading weights once takes as long as multiplying them with so many tokens. It is hidden where every token needs all
#: of them; experts that few tokens need are read all the same.
_READING = 180
#: What adapters read once more, as a part of a forward pass.
_SELECTIVE = 0.002
#: Weights of a decoder layer of Mistral-7B, to which the host's times are relative.
_WEIGHTS_OF_A_LAYER = 218_000_000
#: Launch overhead of one layer on the host, forward or backward: a pass of few tokens waits for it.
_STARTING_A_LAYER = 100
#: The same where layers are not compiled and their many small kernels are started one by one.
_STARTING_A_LAYER_EAGER = 250
#: And where the weights of its linear layers are dequantized as well.
_STARTING_TO_DEQUANTIZE = 39
#: What products in FP8 save of a pass on the GPU, and what rounding costs the host more, as parts of the whole: 262 to
#: 162 ms, and 145 to 185 ms.
_SAVED_BY_FP8 = 0.38
_STARTING_FP8 = 0.27


def waits_for_host(tokens: int, shape: ModelShape, compiled: bool) -> bool:
    """Return whether a pass of so many tokens takes the host longer than the GPU: replaying it is faster then."""
    layout = Layout(micro_batch=1, tokens=tokens, dequantized=shape.layers, compiled=compiled)
    return cost(1, replace(layout, captured=True), shape, 4) < cost(1, layout, shape, 4)


def cost(rows: int, layout: Layout, shape: ModelShape, bits: int, fp8: bool = False) -> float:
    """Return the relative time of an optimizer step of `rows` sequences per process; smaller is faster.

    Args:
        rows: The sequences.
        layout: How a pass is laid out.
        shape: The model's shape.
        bits: Of the base's weights.
        fp8: Whether products with weights that are not in 4 bits are in FP8.
    """
    tokens = layout.tokens if layout.typical_tokens is None else layout.typical_tokens
    if layout.captured and layout.typical_tokens is not None:
        tokens += step_of(int(tokens)) / 2  # what fills it up, on average
    checkpointed = layout.checkpointed / shape.layers
    still_quantized = 1 - layout.dequantized / shape.layers if bits == 4 else 0.0
    through = 2 + checkpointed + _SELECTIVE * layout.selective
    times = (shape.linear_weights + shape.expert_weights) / shape.active_weights  # all weights by those of a token
    narrow = 1 - still_quantized if fp8 and not layout.sharded else 0.0
    on_the_gpu = through * (tokens + _READING * (times - 1)) * (1 - _SAVED_BY_FP8 * narrow)
    on_the_gpu += (2 + checkpointed) * still_quantized * _DEQUANTIZING * times
    each = _STARTING_A_LAYER if layout.compiled else _STARTING_A_LAYER_EAGER
    smaller = _WEIGHTS_OF_A_LAYER * shape.layers / shape.active_weights
    on_the_host = (2 + checkpointed) * shape.layers * (each + still_quantized * _STARTING_TO_DEQUANTIZE) * smaller
    on_the_host *= 1 + _STARTING_FP8 * narrow
    if layout.captured:
        on_the_host = 0.0
    passes = rows // layout.micro_batch
    return passes * (_EACH_PASS + max(on_the_gpu, on_the_host))
