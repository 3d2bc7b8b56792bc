"""What the processes of one training decide together, so that none waits for another that has left.

With one process every function here is a plain call. Each must be called by all processes, in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog
import torch
from torch import distributed

from finetune_trainer.settings import Ranks

log = structlog.get_logger(__name__)
#: How long a process waits for the others: one may still download weights, or send a checkpoint.
TIMEOUT: Final = timedelta(hours=1)
T = TypeVar("T")
Item = TypeVar("Item")


class EvaluationAborted(Exception):
    """Work was given up because a process is to stop."""


def all_reduce_any(world: Ranks, *flags: bool) -> list[bool]:
    """For each flag, whether it is set on any process."""
    if world.size == 1:
        return list(flags)
    on_gpu = distributed.get_backend() == "nccl"
    mine = torch.tensor(flags, dtype=torch.int32, device="cuda" if on_gpu else "cpu")
    distributed.all_reduce(mine, op=distributed.ReduceOp.MAX)
    return [bool(flag) for flag in mine.tolist()]


def all_reduce_min(world: Ranks, value: int) -> int:
    """The smallest `value` of any process."""
    if world.size == 1:
        return value
    values: list[Any] = [None] * world.size
    distributed.all_gather_object(values, value)
    return int(min(values))


def all_reduce_sum(ranks: Ranks, value: int) -> int:
    """Return the sum of `value` over all ranks. A collective."""
    if ranks.size == 1:
        return value
    total = torch.tensor(value, device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(total)
    return int(total)


def gather_files(ranks: Ranks, folder: Path, name: str) -> None:
    """Bring the file `name` in `folder` of every rank, each on its own node's disk, to rank 0's `folder`. A collective.

    Nothing happens with one rank. Names must differ between ranks.
    """
    if ranks.size == 1:
        return
    files: list[Any] = [None] * ranks.size
    distributed.all_gather_object(files, (name, (folder / name).read_bytes()))
    if ranks.is_main:
        for each, content in files:
            (folder / each).write_bytes(content)


class AsyncScalar:
    """A number on the GPU that is asked for later: it is on its way to the host meanwhile."""

    def __init__(self, number: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._number = number
        if number.is_cuda:
            self._number = torch.empty_like(number, device="cpu", pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def value(self) -> int:
        if self._event is not None:
            self._event.synchronize()
        return int(self._number)


@dataclass
class Batches:
    """Work through items that are dealt out to all processes, in step: each does as many batches as the others.

    A batch too large for the memory of one process is halved on all (`size` keeps the smaller size); a stop that one
    is asked for stops all, at most one batch later. With `sharded` weights no process can compute without the others:
    one that has no item left repeats one, and its result is dropped.
    """

    world: Ranks
    size: int
    interrupted: Callable[[], bool] = lambda: False
    sharded: bool = False

    def run(self, items: Sequence[Item], work: Callable[[Sequence[Item]], T]) -> list[tuple[Sequence[Item], T]]:
        """`work` of each batch of this process's share of `items`. Raises Interrupted on every process alike."""
        mine = items[self.world.rank :: self.world.size]
        most = -(-len(items) // self.world.size)
        done, results = 0, []
        while done < most:
            batch = mine[done : done + self.size]
            result, too_large = self._try(batch or (items[:1] if self.sharded else batch), work)
            too_large, stop = all_reduce_any(self.world, too_large, self.interrupted())
            if stop:
                raise EvaluationAborted
            if too_large:
                size, self.size = self.size, (min(self.size, most - done) + 1) // 2
                log.warning(f"The GPU ran out of memory evaluating {size} rows at once: {self.size} now")
                torch.cuda.empty_cache()
                continue
            done += self.size
            if batch:
                results.append((batch, result))
        return results  # type: ignore[return-value]

    def _try(self, batch: Sequence[Item], work: Callable[[Sequence[Item]], T]) -> tuple[T | None, bool]:
        """The result, and whether the batch was too large. A process that cannot go on alone fails at once."""
        try:
            return (work(batch) if batch else None), False
        except torch.OutOfMemoryError:
            if len(batch) == 1 or (self.sharded and self.world.size > 1):
                raise
            return None, True
