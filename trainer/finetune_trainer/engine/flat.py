"""Many small matrices as one vector: one copy, message or launch instead of hundreds."""

from collections.abc import Sequence

import torch


def end_to_end(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a vector that holds a copy of all `parts`, of one type."""
    return torch.cat([part.flatten() for part in parts])


def flattened(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return such a vector, and views of it in the shapes of the parts."""
    vector = end_to_end(parts)
    views = vector.split([part.numel() for part in parts])
    return vector, [view.view(part.shape) for view, part in zip(views, parts, strict=True)]
