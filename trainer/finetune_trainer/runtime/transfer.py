"""Copies from host memory to the device."""

from collections.abc import Mapping
from typing import Any

import torch


def on_device(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """A micro-batch whose tensors are sent to `device`, without waiting for them."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
