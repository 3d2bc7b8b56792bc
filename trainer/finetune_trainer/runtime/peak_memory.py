"""The peak of GPU memory that a plan predicts: training's, without what evaluations take of the memory left over."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_before = 0


def reset_peak() -> None:
    """Begin to measure anew."""
    global _before
    _before = 0
    torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """Return the peak since `reset_peak`, in bytes that PyTorch's allocator held."""
    return max(_before, torch.cuda.max_memory_allocated())


@contextmanager
def uncounted_memory() -> Iterator[None]:
    """Leave what is allocated meanwhile out of `peak`."""
    global _before
    if not torch.cuda.is_initialized():
        yield
        return
    _before = peak()
    try:
        yield
    finally:
        torch.cuda.empty_cache()  # of use to the next step as it was before
        torch.cuda.reset_peak_memory_stats()
