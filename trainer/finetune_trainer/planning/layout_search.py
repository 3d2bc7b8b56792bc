"""Search for the fastest layout of a training step that fits in GPU memory. Pure, importable without torch."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.planning.cost import cost
from finetune_trainer.planning.device import Device
from finetune_trainer.planning.memory import Layout, Memory, predict
from finetune_trainer.planning.model_shape import ModelShape
from finetune_trainer.planning.shapes import filled_up

#: Larger micro-batches gain nothing on a CPU.
CPU_MICRO_BATCH: Final = 8
#: Nor on a GPU, beyond this many tokens in one pass.
_ENOUGH_TOKENS: Final = 16_384
#: compute_dtype -> training.precision.
_HALF: Final = {"bfloat16": "bf16", "float16": "fp16"}


def can_be_sharded(spec: FineTuneJobSpec, world_size: int) -> bool:
    """Return whether the base weights can be sharded over the processes: LLM.int8 weights carry extra state."""
    return world_size > 1 and spec.quantization.bits != 8


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit`."""
    return next(candidate for candidate in range(min(number, max(1, limit)), 0, -1) if number % candidate == 0)


@dataclass(frozen=True)
class LayoutSearch:
    """Inputs of the layout search, and the search.

    Attributes:
        spec: The job's spec.
        device: What each process trains on.
        shape: The model's shape if it is known.
        attention: The attention implementation.
        longest: Tokens of the longest row.
        share: Sequences of each process and optimizer step.
        processes: Number of processes.
        compiled: Whether decoder layers may be compiled.
        tokens: Returns the most tokens of any micro-batch of so many rows; None counts every row as the longest.
        capturable: Whether passes may be replayed as CUDA graphs.
        mean_row: Tokens of a row on average, where rows are packed; None if it is not known.
        fp8: Whether products with weights that are not in 4 bits are in FP8.
    """

    spec: FineTuneJobSpec
    device: Device
    shape: ModelShape | None
    attention: str
    longest: int
    share: int
    processes: int
    compiled: bool
    tokens: Callable[[int], int] | None
    capturable: bool = False
    mean_row: float | None = None
    fp8: bool = False

    def layout(
        self, micro_batch: int, checkpointed: int, dequantized: int = 0, sharded: bool = False, selective: bool = False
    ) -> Layout:
        selective = selective and self.compiled
        return Layout(
            micro_batch,
            self.most_tokens(micro_batch),
            checkpointed,
            dequantized,
            self.compiled,
            selective,
            self.processes,
            sharded,
            typical_tokens=None if self.mean_row is None else micro_batch * self.mean_row,
        )

    def most_tokens(self, micro_batch: int) -> int:
        """Return the most tokens of any micro-batch of so many rows."""
        most = micro_batch * self.longest
        return min(most, self.tokens(micro_batch)) if self.tokens else most

    def default(self) -> Layout:
        """Return the recipe's layout: for a CPU, and for a GPU if the model's shape is unknown."""
        layers = self.shape.layers if self.shape else 1
        wanted, checkpointing = self.spec.training.micro_batch_size, self.spec.training.gradient_checkpointing
        on_cpu = self.device.kind == "cpu"
        micro = self._sizes(CPU_MICRO_BATCH if on_cpu else 4)[0]
        if checkpointing == "auto":
            checkpointing = "enabled" if not on_cpu and wanted == "auto" else "disabled"
        known = self.compiled and self.shape is not None
        checkpointed, selective = _fixed(checkpointing, layers, known) or (int(checkpointing), False)
        dequantized = 0 if self.spec.quantization.cached_layers == "auto" else self.spec.quantization.cached_layers
        dequantized = min(dequantized, layers) if self._can_dequantize else 0
        layout = self.layout(micro, checkpointed, dequantized, selective=selective)
        # What graphs take can only be predicted of a known shape: of another one they must be asked for.
        asked_for = self.spec.training.cuda_graphs == "enabled" and self.capturable
        return _captured(layout) if asked_for and not checkpointed else layout

    def fastest(self, shape: ModelShape) -> tuple[Layout, int] | None:
        """Return the fastest layout that fits and its peak in bytes; None if none fits."""
        found = self._fitting(shape, sharded=False)
        if not found and can_be_sharded(self.spec, self.processes):  # slower, so only if nothing else fits
            found = self._fitting(shape, sharded=True)
        if not found:
            return None
        if self.spec.training.cuda_graphs == "enabled":
            found = [layout for layout in found if layout.captured] or found
        bits = self.spec.quantization.bits
        layout = min(found, key=lambda layout: cost(self.share, layout, shape, bits, self.fp8))
        return layout, self.peak(shape, layout)

    def peak(self, shape: ModelShape, layout: Layout) -> int:
        return self._memory(shape, layout).total

    def _memory(self, shape: ModelShape, layout: Layout) -> Memory:
        return predict(shape, self.spec, layout, longest=self.longest, attention=self.attention)

    def _needed(self, shape: ModelShape, layout: Layout) -> int:
        """Return the bytes that must be free for the process: CUDA graphs keep those of a pass for themselves."""
        memory = self._memory(shape, layout)
        return memory.total + memory.of_a_pass * layout.captured

    def minimal_memory(self, shape: ModelShape, sharded: bool = False) -> Layout:
        """Return the layout that takes the least memory of those that the spec allows."""
        dequantized, (checkpointed, selective) = self._dequantized(shape) or 0, max(self._checkpointed(shape))
        return self.layout(self._sizes()[-1], checkpointed, dequantized, sharded, selective)

    def _fitting(self, shape: ModelShape, sharded: bool) -> list[Layout]:
        """Return, per micro-batch and checkpointed layers, the layout with the most dequantized layers that fits."""
        found = []
        for micro in self._sizes(max(1, _ENOUGH_TOKENS // self.longest)):
            for checkpointed, selective in self._checkpointed(shape):
                least = self.layout(micro, checkpointed, 0, sharded, selective)
                captured = [_captured(least)] if self.capturable and not checkpointed and not sharded else []
                for each in (least, *captured):
                    dequantized = 0 if sharded else self._most_dequantized(shape, each)
                    layout = replace(each, dequantized=dequantized)
                    if self.device.fits(self._needed(shape, layout)):
                        found.append(layout)
        return found

    def _most_dequantized(self, shape: ModelShape, layout: Layout) -> int:
        """Return the most layers whose weights fit dequantized: each adds the same amount of memory."""
        wanted = self._dequantized(shape)
        if wanted is not None or not self.device.memory_bytes:
            return shape.layers if wanted is None else wanted
        all_dequantized = replace(layout, dequantized=shape.layers)
        if self.device.fits(self._needed(shape, all_dequantized)):
            return shape.layers
        none, one = (self._needed(shape, replace(layout, dequantized=count)) for count in (0, 1))
        return max(0, min(shape.layers - 1, (self.device.usable_bytes - none) // (one - none)))

    @property
    def _can_dequantize(self) -> bool:
        """Whether layers may be kept dequantized: only if products are computed in the dequantized type."""
        quantization = self.spec.quantization
        half = _HALF.get(quantization.compute_dtype)
        return quantization.bits == 4 and half == self.spec.training.precision.replace("fp8", "bf16")

    def _dequantized(self, shape: ModelShape) -> int | None:
        """Return how many layers must be kept dequantized, or None if any number may."""
        wanted = self.spec.quantization.cached_layers
        if not self._can_dequantize:
            return 0
        return None if wanted == "auto" else min(wanted, shape.layers)

    def _sizes(self, most: int = 65_536) -> list[int]:
        """Return the micro-batch sizes to try, largest first."""
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

    def _checkpointed(self, shape: ModelShape) -> list[tuple[int, bool]]:
        """Return the numbers of checkpointed layers to try, and whether the others checkpoint selectively."""
        wanted = self.spec.training.gradient_checkpointing
        if fixed := _fixed(wanted, shape.layers, self.compiled):
            return [fixed]
        several = {*range(0, shape.layers + 1, max(1, shape.layers // 32)), shape.layers}
        numbers = several if wanted == "auto" else {min(wanted, shape.layers)}
        return sorted(itertools.product(numbers, (False, True) if self.compiled else (False,)))


def _captured(layout: Layout) -> Layout:
    return replace(layout, captured=True, tokens=filled_up(layout.tokens))


def _fixed(checkpointing: int | str, layers: int, compiled: bool) -> tuple[int, bool] | None:
    """Return the checkpointed layers that the setting demands, and whether the others checkpoint selectively.

    Only compiled layers can be selective. None: the setting leaves a choice.
    """
    if checkpointing == "disabled":
        return 0, False
    if checkpointing == "selective" and compiled:
        return 0, True
    return (layers, False) if checkpointing in ("enabled", "selective") else None
