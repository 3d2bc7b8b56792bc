"""Predict the peak GPU memory of one process from the model's shape and the spec. Pure, importable without torch.

Counts what PyTorch's allocator holds at the peak of a training step, as torch.cuda.max_memory_allocated() does.
"""

from dataclasses import dataclass

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.planning.model_shape import ModelShape

GIB = 1 << 30
#: Bytes of a weight in 4 bits: half a byte, and one scale per 64 weights (QLoRA, section 3: 8-bit scales with one
#: float32 per 256 of them when quantized twice).
_FOUR_BITS = 0.5 + 4 / 64
_FOUR_BITS_TWICE = 0.5 + 1 / 64 + 4 / (64 * 256)
#: Layers of average size that count for the two buffers of sharded ones, each as large as the largest layer.
_GATHERED_LAYERS = 3
#: Linear layers of one module that read the same input, by the names transformers gives them.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
#: So that torch, which counts small things too, need not give up a large one.
_BUDGET_TO_SPARE = 0.05
#: Optimizer state, bytes per trained weight. Paged states live in managed memory, which the allocator does not count.
OPTIMIZER_BYTES = {
    "paged_adamw_8bit": 0.0,
    "paged_adamw_32bit": 0.0,
    "adamw_8bit": 2.1,
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adafactor": 0.1,
}


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by what holds them."""

    weights: int
    adapter: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.workspace

    @property
    def of_a_pass(self) -> int:
        """What is gone after a pass; CUDA graphs keep as much for themselves, beside what other passes take."""
        return self.activations + self.workspace


@dataclass(frozen=True)
class Layout:
    """How the training of one process is laid out, as far as memory goes.

    Attributes:
        micro_batch: Rows of a micro-batch.
        tokens: The most tokens of a micro-batch.
        checkpointed: Decoder layers that keep only their input for the backward pass (activation checkpointing).
        dequantized: Decoder layers that keep their 4-bit weights dequantized.
        compiled: Whether decoder layers are compiled.
        selective: Whether compiled layers recompute the inputs of adapters (selective checkpointing).
        processes: Number of processes.
        sharded: Whether the base weights are sharded over all processes.
        captured: Whether passes are replayed as CUDA graphs.
        typical_tokens: Tokens of a micro-batch on average, for its time; None counts the most.
    """

    micro_batch: int
    tokens: int
    checkpointed: int = 0
    dequantized: int = 0
    compiled: bool = False
    selective: bool = False
    processes: int = 1
    sharded: bool = False
    captured: bool = False
    typical_tokens: float | None = None


def predict(shape: ModelShape, spec: FineTuneJobSpec, layout: Layout, *, longest: int, attention: str) -> Memory:
    """Predict the memory at the peak of a training step of one process; `longest` is the longest row in tokens."""
    width = 4 if spec.training.precision == "fp32" else 2
    saved = _saved_when_selective if layout.selective else _saved_when_compiled if layout.compiled else _saved_per_token
    scores = _scores(shape, layout.micro_batch, longest, attention, width)
    layer = layout.tokens * saved(shape, spec, width) + scores + _cast_weights(shape, spec, layout)
    kept = layout.tokens * (shape.hidden_size * width + _escaped_per_token(shape, spec, width))
    # The first layers are checkpointed, and their backward pass comes last: what the others keep is gone by then.
    whole = max(shape.layers - layout.checkpointed, min(layout.checkpointed, 1))
    gradients = 4 + 8 * layout.captured  # the pass's own, those that its graph leaves, and their sum over the step
    return Memory(
        weights=_weights(shape, spec, layout),
        adapter=int(adapter_weights(shape, spec) * (4 + gradients + OPTIMIZER_BYTES[spec.training.optimizer])),
        activations=int(layout.checkpointed * kept + whole * layer),
        workspace=_workspace(shape, spec, layout),
    )


def adapter_weights(shape: ModelShape, spec: FineTuneJobSpec) -> int:
    """Return the number of trained weights of the adapter."""
    if shape.trained is not None:
        return shape.trained
    lora = spec.lora
    each = (
        lora.rank * (inputs + outputs) + (outputs if lora.dora else 0)
        for inputs, outputs in _targets(shape, spec).values()
    )
    tables = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return shape.layers * sum(each) + tables * lora.embeddings


def _targets(shape: ModelShape, spec: FineTuneJobSpec) -> dict[str, tuple[int, int]]:
    wanted = spec.lora.target_modules
    everything = wanted == ["all-linear"]
    names = {name.rpartition(".")[2] for name in wanted}
    return {name: each for name, each in shape.linear_shapes.items() if everything or name in names}


def _weights(shape: ModelShape, spec: FineTuneJobSpec, layout: Layout) -> int:
    """Return the bytes of all weights: of sharded linear layers, one process's shard and the layers being gathered.

    The scales of 4-bit weights, the embeddings and the head are whole on every process.
    """
    quantization = spec.quantization
    width = 4 if spec.training.precision == "fp32" else 2
    scales = 0.0
    if quantization.bits == 4:
        per_weight = 0.5
        scales = (_FOUR_BITS_TWICE if quantization.double_quant else _FOUR_BITS) - per_weight
    elif quantization.bits == 8:
        per_weight = 1.0
    else:
        per_weight = width = 4 if quantization.compute_dtype == "float32" else 2
    held = 1 / layout.processes + _GATHERED_LAYERS / shape.layers if layout.sharded else 1.0
    quantized = per_weight * held + scales
    dequantized = layout.dequantized / shape.layers
    each = quantized * (1 - dequantized) + 2 * dequantized
    of_experts = width if quantization.bits == 8 else each
    return int(shape.linear_weights * each + shape.expert_weights * of_experts + shape.other_weights * width)


def _cast_weights(shape: ModelShape, spec: FineTuneJobSpec, layout: Layout) -> int:
    """Return the bytes of a layer's weights in half precision that autocast makes, and autograd keeps.

    The compiler makes them again instead.
    """
    wide = spec.quantization.bits == 16 and spec.quantization.compute_dtype == "float32"
    cast = wide and spec.training.precision != "fp32" and not layout.compiled
    return 2 * shape.linear_weights // shape.layers if cast else 0


def _saved_per_token(shape: ModelShape, spec: FineTuneJobSpec, width: int) -> int:
    """Return the bytes that one decoder layer keeps per token for its backward pass.

    The base is frozen: no linear layer's input is kept for its own sake, only for the adapter on it.
    """
    hidden, queries = shape.hidden_size, shape.heads * shape.head_dim
    norms = 2 * hidden * 4 + hidden * width  # the inputs in float32, and normalized values that no adapter reads
    attention = width * (2 * queries + 2 * shape.kv_heads * shape.head_dim)  # q, k, v and the output
    mlp = width * (3 * shape.intermediate_size + shape.routed_size)  # gate, its activation, up; the experts' answers
    return norms + attention + mlp + _adapter_per_token(shape, spec, width) + _escaped_per_token(shape, spec, width)


def _saved_when_compiled(shape: ModelShape, spec: FineTuneJobSpec, width: int) -> int:
    """Return the same for a compiled layer, which recomputes norms, gate*up and some dropout masks."""
    read = _adapter_inputs(shape, spec)
    masks = sum(read.get(names[0], 0) for names in SAME_INPUT)
    if not spec.lora.dropout:
        masks = 0
        read.pop("o_proj", None)  # attention's output as it is
    return _saved_when_selective(shape, spec, width) + width * sum(read.values()) + masks


def _saved_when_selective(shape: ModelShape, spec: FineTuneJobSpec, width: int) -> int:
    """Return the same if the adapters' inputs, outputs of norms and dropout, are recomputed too.

    The cheapest step of selective checkpointing (Korthikanti et al. 2022, arXiv:2205.05198).
    """
    hidden, queries = shape.hidden_size, shape.heads * shape.head_dim
    attention = 2 * queries + 2 * shape.kv_heads * shape.head_dim
    mlp = 2 * shape.intermediate_size + shape.routed_size
    return width * (2 * hidden + attention + mlp + _ranks(shape, spec))


def selective_budget(shape: ModelShape, spec: FineTuneJobSpec, tokens: int) -> float:
    """Return torch's activation_memory_budget for selective checkpointing in a pass of `tokens` tokens.

    That is the fraction kept of what a compiled layer would keep beyond its input.
    """
    cast = adapter_weights(shape, spec)  # to half precision, and kept
    if spec.quantization.bits == 16 and spec.quantization.compute_dtype == "float32":
        cast += shape.linear_weights
    others = 2 * cast / shape.layers / tokens - 2 * shape.hidden_size
    most, least = (saved(shape, spec, 2) + others for saved in (_saved_when_compiled, _saved_when_selective))
    return min(1.0, least / most + _BUDGET_TO_SPARE)


def _adapter_per_token(shape: ModelShape, spec: FineTuneJobSpec, width: int) -> int:
    """Return the bytes that the adapters of one decoder layer keep per token.

    These are their inputs (a shared one once), the dropout masks of those, and the products with A.
    """
    read = sum(_adapter_inputs(shape, spec).values())
    return read * width + (read if spec.lora.dropout else 0) + _ranks(shape, spec) * width


def _adapter_inputs(shape: ModelShape, spec: FineTuneJobSpec) -> dict[str, int]:
    """Return the widths of the inputs of one decoder layer's adapters, by the first adapter that reads each.

    DoRA adapters do not share inputs.
    """
    read = {}
    for name, (inputs, _) in _targets(shape, spec).items():
        first = next((names[0] for names in SAME_INPUT if name in names), name)
        of_experts = first == "gate_proj" and shape.routed_size
        read[name if spec.lora.dora else first] = of_experts or inputs
    return read


def _ranks(shape: ModelShape, spec: FineTuneJobSpec) -> int:
    chosen = shape.routing.chosen if shape.routing else 1
    times = (chosen if name in ("gate_proj", "up_proj", "down_proj") else 1 for name in _targets(shape, spec))
    return sum(times) * spec.lora.rank


def _escaped_per_token(shape: ModelShape, spec: FineTuneJobSpec, width: int) -> int:
    """Return the bytes per token that a decoder layer keeps although its activations are checkpointed.

    bitsandbytes' LLM.int8 hangs the input of every linear layer on the autograd node itself, where checkpointing
    cannot drop it (0.50, MatMul8bitLt.forward: ctx.tensors). Each layer's input is counted, also where several share
    one: that is within 2 % of the one measurement there is (12.5 GiB for a 7B model on an H200; docs/performance.md).
    """
    if spec.quantization.bits != 8:
        return 0
    return width * sum(inputs for inputs, _ in shape.linear_shapes.values())


def _scores(shape: ModelShape, micro_batch: int, length: int, attention: str, width: int) -> int:
    """Return the bytes of one layer's attention scores, which only the eager implementation keeps."""
    return micro_batch * shape.heads * length * length * (4 + width) if attention == "eager" else 0


def _workspace(shape: ModelShape, spec: FineTuneJobSpec, layout: Layout) -> int:
    """Return the bytes of temporary buffers.

    These are two dequantized weights of the largest layer, or one of a layer's experts, its output gradients, and the
    head's tile of logits.
    """
    largest = 2 * max(inputs * outputs for inputs, outputs in shape.linear_shapes.values())
    if shape.routing and shape.expert_weights and spec.quantization.bits == 4:
        of_one = shape.routing.experts * 2 * shape.routing.width * shape.hidden_size
        largest = max(of_one, 2 * shape.hidden_size * max(shape.heads * shape.head_dim, shape.routing.shared))
    buffers = 2 * largest if spec.quantization.bits < 16 and layout.dequantized < shape.layers else 0
    gradients = layout.tokens * (shape.intermediate_size * 2 * 2 + shape.hidden_size * 4 + shape.routed_size * 2 * 4)
    logits = min(layout.tokens, 1024) * shape.vocab_size * 4 * 2
    return buffers + gradients + logits
