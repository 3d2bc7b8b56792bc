"""Work that rank 0 does for all ranks. Torch-free with one rank."""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from finetune_trainer.settings import Ranks

T = TypeVar("T")


def run_on_rank_zero(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do `work` on rank 0; every rank returns its result or raises its error. A collective."""
    if ranks.size == 1:
        return work()
    from torch import distributed

    if not ranks.is_main:
        answer: list[Any] = [None]
        distributed.broadcast_object_list(answer, src=0)
        value, error = answer[0]
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]
    try:
        result = work()
    except Exception as error:
        distributed.broadcast_object_list([(None, _portable(error))], src=0)
        raise
    distributed.broadcast_object_list([(result, None)], src=0)
    return result


def _portable(error: Exception) -> Exception:
    """Return `error`, or its text where it cannot be pickled."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    except Exception:
        return RuntimeError(str(error))
    return copy if isinstance(copy, type(error)) else RuntimeError(str(error))
