"""Gradients of two processes are summed, bucket by bucket, in the last pass of a step."""

import functools
import pickle
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from finetune_trainer.engine import gradients
from finetune_trainer.engine.gradients import GradientReducer


def _work(rank: int, store: str, task: Callable[[int], Any], queue: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    queue.put((rank, pickle.dumps(task(rank))))  # as bytes: a tensor would be shared, and gone with this process
    distributed.barrier()
    distributed.destroy_process_group()


def _in_two(tmp_path: Path, task: Callable[[int], Any]) -> list[Any]:
    """What `task` (rank) returns in each of two processes."""
    context = get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_work, args=(rank, str(tmp_path / "store"), task, queue)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = {rank: pickle.loads(result) for rank, result in (queue.get(timeout=60) for _ in processes)}
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return [found[0], found[1]]


def _parameters(rank: int) -> list[torch.nn.Parameter]:
    """Matrices of two types, in buckets of two: not the same numbers on both processes."""
    gradients._BUCKET = 2 * 6 * 4
    generator = torch.Generator().manual_seed(rank)
    kinds = [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float32]
    return [torch.nn.Parameter(torch.randn(2, 3, generator=generator).to(kind)) for kind in kinds]


def _step(rank: int, overlapped: bool = True) -> Any:
    parameters = _parameters(rank)
    reducer = GradientReducer(parameters, overlapped=overlapped)
    begun = [each.detach().float().clone() for each in parameters]
    used = parameters[:-1] if rank == 0 else parameters[1:-1]  # the first by one process alone, the last by none
    for last in (False, True):
        loss = sum(((each.float() * (rank + 1)).sum() for each in used), torch.zeros(()))
        if not last:
            loss.backward()
            passed = [None if each.grad is None else each.grad.float().clone() for each in parameters]
            continue
        with reducer.synchronized():
            loss.backward()
    again = [each.grad.float().clone() for each in parameters if each.grad is not None]
    return begun, passed, again, [len(bucket) for bucket in reducer._buckets]


@pytest.mark.parametrize("overlapped", [True, False])
def test_two_processes_begin_alike_and_end_a_step_with_the_sum(overlapped: bool, tmp_path: Path) -> None:
    step = functools.partial(_step, overlapped=overlapped)
    (begun, passed, found, buckets), (begun_1, passed_1, found_1, _) = _in_two(tmp_path, step)
    assert buckets == [2, 2, 1]
    for one, other in zip(begun, begun_1, strict=True):
        assert torch.equal(one, other)
    assert passed[1].eq(1).all() and passed_1[1].eq(2).all()  # before the last pass each has its own
    assert passed[4] is None and passed_1[0] is None
    for one, other, expected in zip(found, found_1, (2, 6, 6, 6, 0), strict=True):
        assert one.eq(expected).all() and other.eq(expected).all()


def _fail_then_step(rank: int) -> Any:
    parameters = [torch.nn.Parameter(torch.ones(3))]
    reducer = GradientReducer(parameters)
    with pytest.raises(RuntimeError), reducer.synchronized():
        raise RuntimeError("out of memory")
    parameters[0].sum().backward()  # not synchronized: nothing is sent
    alone = parameters[0].grad.clone()  # type: ignore[union-attr]
    with reducer.synchronized():
        parameters[0].sum().backward()
    return alone, parameters[0].grad


def test_a_pass_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    for alone, together in _in_two(tmp_path, _fail_then_step):
        assert alone.eq(1).all() and together.eq(4).all()
