"""Many small matrices as one vector: one copy, message or launch in the place of hundreds."""

from collections.abc import Sequence

import torch


def flattened(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A vector that holds a copy of all `parts`, of one type, end to end; and views of it in their shapes."""
    vector = torch.cat([part.flatten() for part in parts])
    views = vector.split([part.numel() for part in parts])
    return vector, [view.view(part.shape) for view, part in zip(views, parts, strict=True)]
