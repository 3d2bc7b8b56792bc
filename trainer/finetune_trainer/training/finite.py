"""Notice a loss, gradient or weight that is NaN or infinite without waiting for the device at every step."""

from typing import Final

import torch

from finetune_trainer.errors import Diverged
from finetune_trainer.settings import Ranks

_NEVER: Final = torch.iinfo(torch.int64).max


class FiniteCheck:
    """Remembers, on the device, the first step with a bad number; `check` reads it."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._first_bad_step: torch.Tensor | None = None

    def note(self, value: torch.Tensor, step: int) -> None:
        """Remember `step` if `value`, a scalar, is the first that is NaN or infinite."""
        if self._first_bad_step is None:
            self._first_bad_step = torch.full((), _NEVER, device=value.device)
        here = torch.where(torch.isfinite(value), self._first_bad_step, step)
        self._first_bad_step = torch.minimum(self._first_bad_step, here)

    def check(self, step: int) -> None:
        """Wait for the device and raise Diverged if a number noted up to `step` was bad. A collective."""
        if self._first_bad_step is None:
            return
        bad = self._first_bad_step
        if self._ranks.size > 1:
            bad = bad.clone()
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MIN)
        if int(bad) <= step:
            raise Diverged(
                f"The loss, its gradient or the adapter's weights became NaN or infinite at step {int(bad)};"
                " the checkpoint before it is kept"
            )
