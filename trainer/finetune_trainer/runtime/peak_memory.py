"""The peak of GPU memory that a plan predicts: training's, without what evaluations take of the memory left over."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_before = 0
_set_aside = 0


def reset_peak() -> None:
    """Begin to measure anew."""
    global _before
    _before = 0
    torch.cuda.reset_peak_memory_stats()


def release_memory() -> None:
    """Give back the GPU memory that nobody uses any more, and begin to measure anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        reset_peak()


def peak() -> int:
    """Return the peak since `reset_peak`, in bytes that PyTorch's allocator held."""
    return max(_before, torch.cuda.max_memory_allocated())


def reserved() -> int:
    """Return the bytes that PyTorch has taken from the device, after it gave back what nobody uses."""
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def set_aside(size: int) -> None:
    """Say how many reserved bytes nobody else can have, though nothing is allocated there: those of CUDA graphs."""
    global _set_aside
    _set_aside = size


def free(device: Any) -> int:
    """Return the bytes that can be allocated on the GPU `device`."""
    left, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return left + max(0, unused - _set_aside)


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
