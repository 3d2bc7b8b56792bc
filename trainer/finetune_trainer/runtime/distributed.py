"""Collective helpers; every rank must call them in the same order. With one process each is a plain call.

torch is imported where there is more than one process: a single one does without until it loads the model.
"""

import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from finetune_trainer.settings import Ranks

#: How long a process waits for the others: one may still download weights, or upload a checkpoint.
TIMEOUT: Final = timedelta(hours=1)
T = TypeVar("T")


def run_on_rank_zero(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only; return its result, or raise its error, on every rank."""
    if ranks.size == 1:
        return work()
    from torch import distributed

    if not ranks.is_main:
        received: list[Any] = [None]
        distributed.broadcast_object_list(received, src=0)
        result, error = received[0]
        if error is not None:
            raise error
        return cast(T, result)
    try:
        result = work()
    except Exception as error:
        distributed.broadcast_object_list([(None, _picklable(error))], src=0)
        raise
    distributed.broadcast_object_list([(result, None)], src=0)
    return result


def all_reduce_any(ranks: Ranks, *flags: bool) -> list[bool]:
    """Return for each flag whether it is set on any rank."""
    if ranks.size == 1:
        return list(flags)
    import torch
    from torch import distributed

    on_gpu = distributed.get_backend() == "nccl"
    mine = torch.tensor(flags, dtype=torch.int32, device="cuda" if on_gpu else "cpu")
    distributed.all_reduce(mine, op=distributed.ReduceOp.MAX)
    return [bool(flag) for flag in mine.tolist()]


def all_reduce_min(ranks: Ranks, value: int) -> int:
    """Return the smallest `value` of any rank."""
    return min(all_gather(ranks, value))


def all_reduce_sum(ranks: Ranks, value: int) -> int:
    """Return the sum of `value` over all ranks."""
    if ranks.size == 1:
        return value
    import torch
    from torch import distributed

    total = torch.tensor(value, device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(total)
    return int(total)


def all_gather(ranks: Ranks, value: T) -> list[T]:
    """Return the `value` of each rank, in order of rank."""
    if ranks.size == 1:
        return [value]
    from torch import distributed

    gathered: list[Any] = [None] * ranks.size
    distributed.all_gather_object(gathered, value)
    return gathered


def gather_files(ranks: Ranks, folder: Path, name: str) -> None:
    """Bring the file `name` in `folder` of every rank, each on its own node's disk, to rank 0's `folder`.

    Nothing happens with one rank. Names must differ between ranks.
    """
    if ranks.size == 1:
        return
    files = all_gather(ranks, (name, (folder / name).read_bytes()))
    if ranks.is_main:
        for each, content in files:
            (folder / each).write_bytes(content)


def destroy_process_group(ranks: Ranks) -> None:
    """End the process group: from here on rank 0 works alone."""
    if ranks.size == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _picklable(error: Exception) -> Exception:
    """`error` if it survives pickling, else a RuntimeError with its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    except Exception:
        return RuntimeError(str(error))
    return copy if isinstance(copy, type(error)) else RuntimeError(str(error))
