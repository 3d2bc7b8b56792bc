"""Where sequences begin among packed tokens."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SequenceLayout:
    """Where sequences begin among packed tokens.

    Attributes:
        starts: Where each begins, and the end, int32 [sequences + 1].
        longest: The longest one, in tokens.
        kept: Indices of the real tokens among rows x width, int64; None where all are real.
    """

    starts: torch.Tensor
    longest: int
    kept: torch.Tensor | None = None


def layout_from_mask(mask: torch.Tensor) -> SequenceLayout:
    """Return the layout of rows padded on either side. `mask` [rows, width] is true or 1 at real tokens."""
    real = mask.bool()
    lengths = real.sum(-1, dtype=torch.int32)
    return SequenceLayout(_starts(lengths), int(lengths.max()), real.flatten().nonzero().flatten())


def layout_from_positions(positions: torch.Tensor) -> SequenceLayout:
    """Return the layout of rows with several sequences each.

    A sequence begins at every row, and wherever `positions` [rows, width] do not increase by one.
    """
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    first = begins.flatten().nonzero().flatten()
    starts = torch.nn.functional.pad(first, (0, 1), value=positions.numel()).to(torch.int32)
    return SequenceLayout(starts, int(starts.diff().max()))


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
