"""How a run is laid out on the hardware: pure arithmetic, importable without torch.

(spec, device, number of processes, model shape) -> ExecutionPlan, or a sentence that says what to change.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.errors import ConfigInvalid, WontFit
from finetune_trainer.planning.cost import cost
from finetune_trainer.planning.memory import (
    GIB,
    Layout,
    ModelShape,
    predict,
)

__all__ = ["CPU_MICRO_BATCH", "Device", "ModelShape", "make_plan", "packs", "why_not_compile"]

#: Larger micro-batches gain nothing on a CPU.
CPU_MICRO_BATCH = 8
#: Nor on a GPU, beyond this many tokens in one pass.
_ENOUGH_TOKENS = 16_384
#: Of the GPU's memory, what a plan may count on; the rest is fragmentation and what PyTorch itself wastes.
_USABLE = 0.92
#: The CUDA context and library handles.
_CONTEXT_BYTES = int(0.6 * GIB)
#: Attention implementations that take rows laid end to end as they are. auto becomes one of them where a GPU has them.
_WITHOUT_PADDING = ("auto", "varlen", "flash_attention_2")
_HALF = {"bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Device:
    """What one process trains on. `memory_bytes` is the GPU's total memory (0: a CPU, or unknown)."""

    kind: str  # "cpu" or "cuda"
    name: str = ""
    memory_bytes: int = 0

    @property
    def usable_bytes(self) -> int:
        return max(0, int(self.memory_bytes * _USABLE) - _CONTEXT_BYTES)

    def holds(self, peak: int) -> bool:
        return not self.memory_bytes or peak <= self.usable_bytes


def packs(spec: FineTuneJobSpec, device: Device, attention: str) -> bool:
    """Whether rows are laid end to end."""
    if spec.training.packing == "auto":
        return device.kind == "cuda" and attention in _WITHOUT_PADDING
    return spec.training.packing == "enabled"


def why_not_compile(spec: FineTuneJobSpec, device: Device, packed: bool) -> str | None:
    """What of the spec speaks against compiling the decoder layers; None: nothing does."""
    if spec.training.compile == "disabled":
        return "training.compile is disabled"
    if spec.quantization.bits == 8:
        return "LLM.int8 weights cannot be compiled"
    if spec.lora.dora:
        return "DoRA is not compiled"
    if spec.training.compile == "enabled":
        return None
    if device.kind == "cpu":
        return "it does not pay on a CPU"
    return None if packed else "rows are padded, each micro-batch to another width"


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
    tokens: Callable[[int], int] | None = None,
    can_compile: bool = True,
    has_fp8: bool = True,
) -> ExecutionPlan:
    """Choose the fastest layout that fits; the effective batch is always batchSize.

    `longest` is the longest row in tokens (default: training.maxLength), `tokens` says for a micro-batch of so many
    rows how many tokens the largest will have (default: as if all were the longest). Without `shape` no memory is
    predicted. Raises ConfigInvalid, and WontFit with the changes that would make it fit.
    """
    share = local_batch(spec, world_size)
    length = min(longest or spec.training.max_length, spec.training.max_length)
    packed = packs(spec, device, attention)
    compiled = can_compile and why_not_compile(spec, device, packed) is None
    case = _Case(spec, device, shape, attention, length, share, world_size, compiled, tokens)
    layout, peak = case.default(), None
    if shape and device.kind == "cuda":
        layout, peak = case.fastest(shape)
    return ExecutionPlan(
        micro_batch_size=layout.micro_batch,
        gradient_accumulation_steps=share // layout.micro_batch,
        world_size=world_size,
        sharded=layout.sharded if world_size > 1 else None,
        gradient_checkpointing=layout.recomputed > 0,
        checkpointed_layers=layout.recomputed if shape else None,
        selective_checkpointing=layout.selective,
        cached_layers=layout.cached if spec.quantization.bits == 4 else None,
        packing=packed,
        tokens_per_pass=layout.tokens,
        compiled=layout.compiled,
        fp8=_in_fp8(spec, layout) and has_fp8,
        attention=attention,
        predicted_peak_memory_bytes=peak,
    )


def _in_fp8(spec: FineTuneJobSpec, layout: Layout) -> bool:
    plain = layout.cached > 0 if spec.quantization.bits == 4 else spec.quantization.bits == 16
    return spec.training.precision == "fp8" and plain and not layout.sharded


def can_be_sharded(spec: FineTuneJobSpec, world_size: int) -> bool:
    """Whether the base's weights can be dealt out over the processes (FSDP). Those of LLM.int8 carry state besides."""
    return world_size > 1 and spec.quantization.bits != 8


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(candidate for candidate in range(min(number, max(1, limit)), 0, -1) if number % candidate == 0)


@dataclass(frozen=True)
class _Case:
    """What a layout is looked for."""

    spec: FineTuneJobSpec
    device: Device
    shape: ModelShape | None
    attention: str
    longest: int
    share: int
    processes: int
    compiled: bool
    tokens: Callable[[int], int] | None

    def layout(
        self, micro_batch: int, recomputed: int, cached: int = 0, sharded: bool = False, selective: bool = False
    ) -> Layout:
        compiled = self.compiled and not sharded
        selective = selective and compiled
        tokens = self.most_tokens(micro_batch)
        return Layout(micro_batch, tokens, recomputed, cached, compiled, selective, self.processes, sharded)

    def most_tokens(self, micro_batch: int) -> int:
        """Of any micro-batch of so many rows."""
        most = micro_batch * self.longest
        return min(most, self.tokens(micro_batch)) if self.tokens else most

    def default(self) -> Layout:
        """On a CPU, and on a GPU where nothing is known of the model: the recipe's own choice."""
        layers = self.shape.layers if self.shape else 1
        wanted, checkpointing = self.spec.training.micro_batch_size, self.spec.training.gradient_checkpointing
        on_cpu = self.device.kind == "cpu"
        micro = self._sizes(CPU_MICRO_BATCH if on_cpu else 4)[0]
        if checkpointing == "auto":
            checkpointing = "enabled" if not on_cpu and wanted == "auto" else "disabled"
        known = self.compiled and self.shape is not None
        fixed = _fixed(checkpointing, layers, known)
        recomputed, selective = fixed or (checkpointing if isinstance(checkpointing, int) else layers, False)
        cached = 0 if self.spec.quantization.cached_layers == "auto" else self.spec.quantization.cached_layers
        return self.layout(micro, recomputed, min(cached, layers) if self._can_cache else 0, selective=selective)

    def fastest(self, shape: ModelShape) -> tuple[Layout, int]:
        """The fastest layout that fits, and its peak in bytes."""
        found = self._fitting(shape, sharded=False)
        if not found and can_be_sharded(self.spec, self.processes):  # slower, so only where nothing else fits
            found = self._fitting(shape, sharded=True)
        if not found:
            raise WontFit(_refusal(self, shape))
        layout = min(found, key=lambda layout: cost(self.share, layout, shape, self.spec.quantization.bits))
        return layout, self.peak(shape, layout)

    def peak(self, shape: ModelShape, layout: Layout) -> int:
        return predict(shape, self.spec, layout, longest=self.longest, attention=self.attention).total

    def frugal(self, shape: ModelShape, sharded: bool = False) -> Layout:
        """The layout that takes least, of those the spec allows."""
        cached, (recomputed, selective) = self._cached(shape) or 0, max(self._recomputed(shape, sharded))
        return self.layout(self._sizes()[-1], recomputed, cached, sharded, selective)

    def _fitting(self, shape: ModelShape, sharded: bool) -> list[Layout]:
        """Of each micro-batch and number of recomputed layers, the layout with the most cached layers that fits."""
        found = []
        for micro in self._sizes(max(1, _ENOUGH_TOKENS // self.longest)):
            for recomputed, selective in self._recomputed(shape, sharded):
                least = self.layout(micro, recomputed, 0, sharded, selective)
                cached = 0 if sharded else self._most_cached(shape, least)
                layout = replace(least, cached=cached)
                if self.device.holds(self.peak(shape, layout)):
                    found.append(layout)
        return found

    def _most_cached(self, shape: ModelShape, layout: Layout) -> int:
        """The most layers whose weights can be kept dequantized: memory grows with each by the same amount."""
        wanted = self._cached(shape)
        if wanted is not None or not self.device.memory_bytes:
            return shape.layers if wanted is None else wanted
        all_cached = replace(layout, cached=shape.layers)
        if self.device.holds(self.peak(shape, all_cached)):
            return shape.layers
        none, one = (self.peak(shape, replace(layout, cached=count)) for count in (0, 1))
        return max(0, min(shape.layers - 1, (self.device.usable_bytes - none) // (one - none)))

    @property
    def _can_cache(self) -> bool:
        """Only where products are computed in the type that weights are dequantized to anyway."""
        quantization = self.spec.quantization
        half = _HALF.get(quantization.compute_dtype)
        return quantization.bits == 4 and half == self.spec.training.precision.replace("fp8", "bf16")

    def _cached(self, shape: ModelShape) -> int | None:
        """How many layers must be cached; None: any number may."""
        wanted = self.spec.quantization.cached_layers
        if not self._can_cache:
            return 0
        return None if wanted == "auto" else min(wanted, shape.layers)

    def _sizes(self, most: int = 65_536) -> list[int]:
        """Micro-batches that may be tried, the largest first."""
        wanted = self.spec.training.micro_batch_size
        if wanted == "auto":
            most = largest_divisor(self.share, most)
            return [size for size in range(most, 0, -1) if self.share % size == 0]
        if self.share % wanted:
            raise ConfigInvalid(
                f"spec.training.microBatchSize: {wanted} must divide {self.share}, the sequences of each process and"
                " step"
            )
        return [wanted]

    def _recomputed(self, shape: ModelShape, sharded: bool) -> list[tuple[int, bool]]:
        """Numbers of recomputed layers that may be tried, and whether the others recompute selectively."""
        wanted, compiled = self.spec.training.gradient_checkpointing, self.compiled and not sharded
        if fixed := _fixed(wanted, shape.layers, compiled):
            return [fixed]
        several = {*range(0, shape.layers + 1, max(1, shape.layers // 32)), shape.layers}
        numbers = several if wanted == "auto" else {min(wanted, shape.layers)}
        return sorted(itertools.product(numbers, (False, True) if compiled else (False,)))


def _fixed(checkpointing: int | str, layers: int, compiled: bool) -> tuple[int, bool] | None:
    """What training.gradientCheckpointing says in a word: layers recomputed whole, and whether the others recompute
    selectively, which only compiled ones can. None: it leaves a choice."""
    if checkpointing == "disabled":
        return 0, False
    if checkpointing == "selective" and compiled:
        return 0, True
    return (layers, False) if checkpointing in ("enabled", "selective") else None


def _refusal(case: _Case, shape: ModelShape) -> str:
    layout = case.frugal(shape, can_be_sharded(case.spec, case.processes))
    need = (case.peak(shape, layout) + _CONTEXT_BYTES) / _USABLE
    cures = list(_cures(case, shape, layout))
    least = replace(case.layout(1, shape.layers), sharded=layout.sharded)
    if not cures and layout != least and case.device.holds(case.peak(shape, least)):
        cures = ["set training.microBatchSize: 1 and training.gradientCheckpointing: enabled"]
    return (
        f"needs {need / GIB:.1f} GiB of GPU memory at micro-batch {layout.micro_batch}, the GPU has"
        f" {case.device.memory_bytes / GIB:.1f}: {', or '.join([*cures, 'take a larger GPU'])}"
    )


def _cures(case: _Case, shape: ModelShape, layout: Layout) -> Iterator[str]:
    """Changes each of which alone would do."""
    spec = case.spec

    def fits(layout: Layout, case: _Case = case) -> bool:
        return case.device.holds(case.peak(shape, layout))

    if layout.cached and fits(replace(layout, cached=0)):
        yield "set quantization.cachedLayers: auto"
    if layout.recomputed < shape.layers and fits(replace(layout, recomputed=shape.layers, selective=False)):
        yield "set training.gradientCheckpointing: enabled"
    sizes = [size for size in range(layout.micro_batch - 1, 0, -1) if layout.micro_batch % size == 0]
    resized = (replace(layout, micro_batch=size, tokens=case.most_tokens(size)) for size in sizes)
    smaller = next(filter(fits, resized), None)
    if smaller:
        yield f"set training.microBatchSize: {smaller.micro_batch}"
    for length in range(case.longest - 8 - case.longest % 8, case.longest // 8, -8):
        tokens = min(layout.tokens, layout.micro_batch * length)
        if fits(replace(layout, tokens=tokens), replace(case, longest=length)):
            yield f"set training.maxLength: {length} or less"
            break
    for bits in (8, 4):
        quantization = spec.quantization.model_copy(update={"bits": bits})
        fewer = replace(case, spec=spec.model_copy(update={"quantization": quantization}))
        if bits < spec.quantization.bits and fits(replace(layout, sharded=layout.sharded and bits != 8), fewer):
            yield f"set quantization.bits: {bits}"
            break
    more = (size for size in (2, 4, 8, 16) if size > layout.processes and spec.training.batch_size % size == 0)
    least = replace(case.layout(1, shape.layers), compiled=False, sharded=True)
    shared = (size for size in more if can_be_sharded(spec, size) and fits(replace(least, processes=size)))
    enough = next(shared, None)
    if enough:
        yield f"share the weights out over {enough} GPUs (resources.gpusPerNode times resources.nodes)"
