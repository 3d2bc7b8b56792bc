"""Whether weights are numbers, seen by their sums: one pass over memory, and no wait for the device."""

from typing import Any, Final

import torch

#: An attribute of a model that loads: the sums of all weights that were quantized. What 4 bits make of NaN is a number.
SUMS: Final = "finetune_sums"


def sum_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a sum that is finite only if all of `tensor` is; None where its type has no other numbers."""
    if not tensor.is_floating_point() or tensor.dtype is torch.float4_e2m1fn_x2:
        return None
    if tensor.element_size() == 1:  # torch does not sum FP8
        tensor = tensor.to(torch.bfloat16)
    return tensor.sum(dtype=torch.float32)


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all of `tensor` is finite: a sum that overflows is no proof."""
    total = sum_of(tensor)
    if total is None or bool(total.isfinite()):
        return True
    return bool((tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor).isfinite().all())


def note_sum(model: Any, value: torch.Tensor) -> None:
    """Add the sum of `value`, which is about to be quantized, to those of `model`."""
    total = sum_of(value)
    if total is not None:
        model.__dict__.setdefault(SUMS, []).append(total)


def sums_are_finite(model: Any, device: str) -> bool:
    """Return whether the sums of all weights of `model` are finite: of those noted, and of those that are as loaded.

    They are taken on `device`: a processor, where weights to be sharded lie, needs a second for each 2 GB.
    """
    sums = model.__dict__.pop(SUMS, [])
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, each in tensors:
            if hasattr(each, "quant_state") or ".parametrizations." in name or each.is_meta:
                continue  # bytes, whatever type they are stored as
            if (total := sum_of(each.detach().to(device))) is not None:
                sums.append(total)
    return not sums or bool(torch.stack([each.to(device) for each in sums]).isfinite().all())
