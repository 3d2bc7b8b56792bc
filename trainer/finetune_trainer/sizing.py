"""How a run is laid out on the hardware: pure arithmetic, importable without torch.

(spec, device, number of processes, model shape) -> ExecutionPlan, or a sentence that says what to change.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.errors import ConfigInvalid, WontFit
from finetune_trainer.memory import GIB, ModelShape, predict

__all__ = ["CPU_MICRO_BATCH", "Device", "ModelShape", "make_plan"]

#: Larger micro-batches gain nothing on a CPU.
CPU_MICRO_BATCH = 8
#: Nor on a GPU, beyond this many tokens in one pass.
_ENOUGH_TOKENS = 16_384
#: Below this many tokens in one pass a GPU idles: recomputing activations costs less than so small a micro-batch.
_FEW_TOKENS = 2_048
#: Of the GPU's memory, what a plan may count on; the rest is fragmentation and what PyTorch itself wastes.
_USABLE = 0.92
#: The CUDA context and library handles.
_CONTEXT_BYTES = int(0.6 * GIB)


@dataclass(frozen=True)
class Device:
    """What one process trains on. `memory_bytes` is the GPU's total memory (0: a CPU, or unknown)."""

    kind: str  # "cpu" or "cuda"
    name: str = ""
    memory_bytes: int = 0

    @property
    def usable_bytes(self) -> int:
        return max(0, int(self.memory_bytes * _USABLE) - _CONTEXT_BYTES)


@dataclass(frozen=True)
class _Layout:
    micro_batch: int
    checkpointing: bool
    processes: int = 1
    sharded: bool = False


def local_batch(spec: FineTuneJobSpec, world_size: int) -> int:
    """Sequences per process and optimizer step. Raises ConfigInvalid when batchSize cannot be shared evenly."""
    if spec.training.batch_size % world_size:
        raise ConfigInvalid(
            f"spec.training.batchSize: {spec.training.batch_size} must be a multiple of the {world_size} processes"
        )
    return spec.training.batch_size // world_size


def make_plan(
    spec: FineTuneJobSpec,
    device: Device,
    world_size: int,
    attention: str,
    shape: ModelShape | None = None,
    longest: int | None = None,
) -> ExecutionPlan:
    """Choose micro-batch, accumulation, checkpointing and packing; the effective batch is always batchSize.

    `longest` is the longest row in tokens (default: training.maxLength). Without `shape` no memory is predicted.
    Raises ConfigInvalid, and WontFit with the changes that would make it fit.
    """
    share = local_batch(spec, world_size)
    length = min(longest or spec.training.max_length, spec.training.max_length)
    layouts = [replace(layout, processes=world_size) for layout in _layouts(spec, share, device, length)]
    layout, peak = layouts[0], None
    if shape and device.kind == "cuda":
        if can_be_sharded(spec, world_size):  # slower, so only where no layout fits otherwise
            layouts += [replace(layout, sharded=True) for layout in layouts]
        peaks = [_peak(shape, spec, each, length, attention) for each in layouts]
        fitting = [pair for pair in zip(layouts, peaks, strict=True) if _fits(pair[1], device)]
        if not fitting:
            raise WontFit(_refusal(shape, spec, device, layouts[-1], length, attention))
        layout, peak = fitting[0]
    elif device.kind == "cuda" and spec.training.micro_batch_size == "auto":
        layout = _Layout(largest_divisor(share, 4), True)  # nothing is known of the model: the recipe's own choice
    return ExecutionPlan(
        micro_batch_size=layout.micro_batch,
        gradient_accumulation_steps=share // layout.micro_batch,
        world_size=world_size,
        sharded=layout.sharded if world_size > 1 else None,
        gradient_checkpointing=layout.checkpointing,
        packing=spec.training.packing == "enabled",
        attention=attention,
        predicted_peak_memory_bytes=peak,
    )


def can_be_sharded(spec: FineTuneJobSpec, world_size: int) -> bool:
    """Whether the base's weights can be dealt out over the processes (FSDP). Those of LLM.int8 carry state besides."""
    return world_size > 1 and spec.quantization.bits != 8


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(candidate for candidate in range(min(number, max(1, limit)), 0, -1) if number % candidate == 0)


def _layouts(spec: FineTuneJobSpec, share: int, device: Device, length: int) -> Iterator[_Layout]:
    """What may be tried, best first, most frugal last."""
    wanted, checkpointing = spec.training.micro_batch_size, spec.training.gradient_checkpointing
    if wanted != "auto" and share % wanted:
        raise ConfigInvalid(
            f"spec.training.microBatchSize: {wanted} must divide {share}, the sequences of each process and step"
        )
    if device.kind == "cpu":
        micro = largest_divisor(share, CPU_MICRO_BATCH) if wanted == "auto" else wanted
        yield _Layout(micro, checkpointing == "enabled")
        return
    most = largest_divisor(share, _ENOUGH_TOKENS // length)
    sizes = [size for size in range(most, 0, -1) if share % size == 0] if wanted == "auto" else [wanted]
    busy = [size for size in sizes if size * length >= _FEW_TOKENS]
    if checkpointing != "enabled":
        yield from (_Layout(size, False) for size in (sizes if checkpointing == "disabled" else busy or sizes[:1]))
    if checkpointing != "disabled":
        yield from (_Layout(size, True) for size in sizes)


def _peak(shape: ModelShape, spec: FineTuneJobSpec, layout: _Layout, length: int, attention: str) -> int:
    memory = predict(
        shape,
        spec,
        micro_batch=layout.micro_batch,
        length=length,
        checkpointing=layout.checkpointing,
        attention=attention,
        processes=layout.processes,
        sharded=layout.sharded,
    )
    return memory.total


def _fits(peak: int, device: Device) -> bool:
    return not device.memory_bytes or peak <= device.usable_bytes


def _refusal(
    shape: ModelShape, spec: FineTuneJobSpec, device: Device, layout: _Layout, length: int, attention: str
) -> str:
    need = (_peak(shape, spec, layout, length, attention) + _CONTEXT_BYTES) / _USABLE
    cures = list(_cures(shape, spec, device, layout, length, attention))
    frugal = replace(layout, micro_batch=1, checkpointing=True)
    if not cures and layout != frugal and _fits(_peak(shape, spec, frugal, length, attention), device):
        cures = ["set training.microBatchSize: 1 and training.gradientCheckpointing: enabled"]
    return (
        f"needs {need / GIB:.1f} GiB of GPU memory at micro-batch {layout.micro_batch}, the GPU has"
        f" {device.memory_bytes / GIB:.1f}: {', or '.join([*cures, 'take a larger GPU'])}"
    )


def _cures(
    shape: ModelShape, spec: FineTuneJobSpec, device: Device, layout: _Layout, length: int, attention: str
) -> Iterator[str]:
    """Changes each of which alone would do."""

    def fits(spec: FineTuneJobSpec, layout: _Layout, length: int) -> bool:
        return _fits(_peak(shape, spec, layout, length, attention), device)

    if not layout.checkpointing and fits(spec, replace(layout, checkpointing=True), length):
        yield "set training.gradientCheckpointing: enabled"
    sizes = [size for size in range(layout.micro_batch - 1, 0, -1) if layout.micro_batch % size == 0]
    smaller = next((size for size in sizes if fits(spec, replace(layout, micro_batch=size), length)), None)
    if smaller:
        yield f"set training.microBatchSize: {smaller}"
    lengths = range(length - 8 - length % 8, length // 8, -8)
    shorter = next((tokens for tokens in lengths if fits(spec, layout, tokens)), None)
    if shorter:
        yield f"set training.maxLength: {shorter} or less"
    for bits in (8, 4):
        quantization = spec.quantization.model_copy(update={"bits": bits})
        if bits < spec.quantization.bits and fits(
            spec.model_copy(update={"quantization": quantization}),
            replace(layout, sharded=layout.sharded and bits != 8),
            length,
        ):
            yield f"set quantization.bits: {bits}"
            break
    more = (size for size in (2, 4, 8, 16) if size > layout.processes and spec.training.batch_size % size == 0)
    shared = (size for size in more if can_be_sharded(spec, size))
    enough = next((size for size in shared if fits(spec, _Layout(1, True, processes=size, sharded=True), length)), None)
    if enough:
        yield f"share the weights out over {enough} GPUs (resources.gpusPerNode times resources.nodes)"
