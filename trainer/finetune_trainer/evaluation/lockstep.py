"""Process sharded items in lockstep: every rank runs the same number of batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog
import torch

from finetune_trainer.runtime.distributed import all_reduce_any
from finetune_trainer.settings import Ranks

log = structlog.get_logger(__name__)
T = TypeVar("T")
Item = TypeVar("Item")


def never() -> bool:
    """Return the answer of a process that nobody asks to stop."""
    return False


class EvaluationAborted(Exception):
    """The evaluation ended early because a process was asked to stop."""


@dataclass
class LockstepBatches:
    """Runs work on batches of items that are partitioned over all ranks; each rank does as many batches as the others.

    A batch too large for the memory of one rank is halved on all of them. A stop that one rank is asked for stops all,
    at most one batch later. With sharded weights no rank can compute without the others: one that has no item left
    repeats one, and its result is dropped.

    Attributes:
        ranks: This process among the others.
        size: Items per batch; after an out-of-memory error the smaller size stays.
        interrupted: Asked after each batch whether this process should stop.
        sharded: Whether the model's weights are sharded over the ranks.
    """

    ranks: Ranks
    size: int
    interrupted: Callable[[], bool] = never
    sharded: bool = False

    def run(self, items: Sequence[Item], work: Callable[[Sequence[Item]], T]) -> list[tuple[Sequence[Item], T]]:
        """Return (batch, result of `work`) for each batch of this rank's share of `items`.

        Raises:
            EvaluationAborted: On every rank alike, when one was asked to stop.
        """
        mine = items[self.ranks.rank :: self.ranks.size]
        most = -(-len(items) // self.ranks.size)
        done = 0
        results: list[tuple[Sequence[Item], T]] = []
        while done < most:
            batch = mine[done : done + self.size]
            found = self._try(batch or (items[:1] if self.sharded else batch), work)
            too_large, stop = all_reduce_any(self.ranks, found is None, self.interrupted())
            if stop:
                raise EvaluationAborted
            if too_large:
                size, self.size = self.size, (min(self.size, most - done) + 1) // 2
                log.warning(f"Evaluation ran out of GPU memory with {size} rows per batch, retrying with {self.size}")
                torch.cuda.empty_cache()
                continue
            done += self.size
            if batch and found:
                results.append((batch, found[0]))
        return results

    def _try(self, batch: Sequence[Item], work: Callable[[Sequence[Item]], T]) -> list[T] | None:
        """Return the result as a list of one; an empty list for no rows; None if the batch needs too much memory.

        Raises:
            torch.OutOfMemoryError: When no smaller batch can help, or the other ranks wait for this one's weights.
        """
        try:
            return [work(batch)] if batch else []
        except torch.OutOfMemoryError:
            if len(batch) == 1 or (self.sharded and self.ranks.size > 1):
                raise
            return None
