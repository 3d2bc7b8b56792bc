"""The device that one process trains on. Pure, importable without torch."""

from dataclasses import dataclass
from typing import Final

from finetune_trainer.planning.memory import GIB

#: Fraction of the GPU's memory that a plan may use; the rest is fragmentation and PyTorch's own waste.
_USABLE: Final = 0.92
#: Bytes of the CUDA context and library handles.
_CONTEXT_BYTES: Final = int(0.6 * GIB)


@dataclass(frozen=True)
class Device:
    """What one process trains on.

    Attributes:
        kind: "cpu" or "cuda".
        name: The GPU's name.
        memory_bytes: The GPU's total memory; 0 for a CPU, or if it is unknown.
    """

    kind: str
    name: str = ""
    memory_bytes: int = 0

    @property
    def usable_bytes(self) -> int:
        """Bytes that tensors may take at the peak."""
        return max(0, int(self.memory_bytes * _USABLE) - _CONTEXT_BYTES)

    def fits(self, peak: int) -> bool:
        """Return whether `peak` bytes fit; always if the memory is unknown."""
        return not self.memory_bytes or peak <= self.usable_bytes


def required_bytes(peak: int) -> float:
    """Return the total memory of a GPU on which `peak` bytes fit."""
    return (peak + _CONTEXT_BYTES) / _USABLE
