"""Work dealt out to processes that stay in step (the others are simulated; test_distributed.py has real ones)."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from finetune_trainer.evaluation import lockstep
from finetune_trainer.evaluation.lockstep import EvaluationAborted, LockstepBatches
from finetune_trainer.settings import Ranks


def _limited(size: int) -> Any:
    def work(batch: Sequence[int]) -> int:
        if len(batch) > size:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return sum(batch)

    return work


def test_a_batch_too_large_is_halved_and_stays_small() -> None:
    batches = LockstepBatches(Ranks(), 8)
    results = batches.run(range(10), _limited(3))
    assert [list(batch) for batch, _ in results] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert [total for _, total in results] == [1, 5, 9, 13, 17]
    assert batches.size == 2
    with pytest.raises(torch.OutOfMemoryError):
        batches.run(range(10), _limited(0))


def test_a_stop_ends_the_work_after_one_batch() -> None:
    seen: list[Sequence[int]] = []
    with pytest.raises(EvaluationAborted):
        LockstepBatches(Ranks(), 2, interrupted=lambda: bool(seen)).run(range(10), seen.append)
    assert seen == [range(2)]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
def test_simulated_processes_do_equally_many_batches_and_every_item_once(
    rows: int, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = {0: 0, 1: 0, 2: 0}
    passes = {0: 0, 1: 0, 2: 0}
    kept: list[int] = []
    for rank in rounds:

        def counted(world: Ranks, *flags: bool) -> list[bool]:
            rounds[world.rank] += 1
            return list(flags)

        def work(batch: Sequence[int], rank: int = rank) -> int:
            passes[rank] += 1
            return len(batch)

        monkeypatch.setattr(lockstep, "all_reduce_any", counted)
        for batch, length in LockstepBatches(Ranks(rank, rank, 3), 2, sharded=sharded).run(range(rows), work):
            assert len(batch) == length
            kept += batch
    assert sorted(kept) == list(range(rows))
    assert len(set(rounds.values())) == 1
    assert passes == rounds or not sharded


def test_a_simulated_process_halves_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([[True, False], [False, False], [False, False]])
    monkeypatch.setattr(lockstep, "all_reduce_any", lambda world, *flags: next(answers))
    results = LockstepBatches(Ranks(1, 1, 2), 4).run(range(8), sum)
    assert results == [(range(1, 5, 2), 4), (range(5, 9, 2), 12)]


def test_a_sharded_process_cannot_go_on_alone_after_running_out_of_memory() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        LockstepBatches(Ranks(0, 0, 2), 4, sharded=True).run(range(8), _limited(1))
