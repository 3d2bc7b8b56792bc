"""Copies between host memory and the device that do not wait for each other."""

from collections.abc import Mapping
from typing import Any

import torch


def on_device(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Return the micro-batch with its tensors on `device`; does not wait for the copies."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


class AsyncScalar:
    """A number on the GPU that is read later: its copy to host memory starts at once."""

    def __init__(self, number: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._number = number
        if number.is_cuda:
            self._number = torch.empty_like(number, device="cpu", pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def value(self) -> int:
        """Wait for the copy and return the number."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._number)
