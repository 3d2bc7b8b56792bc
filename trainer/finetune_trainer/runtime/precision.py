"""Precision names of the spec as torch dtypes and autocast contexts."""

from typing import Any


def torch_dtype(name: str) -> Any:
    """Return torch's dtype for 'bf16', 'bfloat16', 'fp16' and so on."""
    import torch

    return {
        "bf16": torch.bfloat16,
        "fp8": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "fp16": torch.float16,
        "float16": torch.float16,
        "fp32": torch.float32,
        "float32": torch.float32,
    }[name]


def mixed_precision(device: Any, precision: str) -> Any:
    """Return the autocast context in which a step of training.precision computes on `device`."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
