"""What a session does when the GPU's memory runs out."""

from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.data.ragged import TokenLists
from finetune_trainer.errors import GpuOutOfMemory, WontFit
from finetune_trainer.settings import Ranks
from finetune_trainer.training.session import TrainingSession

SPEC = {
    "model": {"source": "hf://org/base"},
    "dataset": {"train": "s3://data/train.jsonl"},
    "output": {"uri": "s3://adapters/a"},
}


def session(plan: ExecutionPlan, **sections: Any) -> Any:
    lists = TokenLists()
    for length in (5, 9, 7, 3):
        lists.append(list(range(length)))
    counter = SimpleNamespace(inc=lambda: None)
    ctx = SimpleNamespace(
        spec=FineTuneJobSpec.model_validate(SPEC | sections),
        ranks=Ranks(),
        telemetry=SimpleNamespace(out_of_memory=counter),
        report=SimpleNamespace(plan=lambda plan: None),
    )
    found = object.__new__(TrainingSession)
    found.ctx, found.plan = ctx, plan  # type: ignore[assignment]
    found.data = SimpleNamespace(train=SimpleNamespace(input_ids=lists))  # type: ignore[assignment]
    return found


def test_graphs_are_the_first_thing_to_go_then_rows() -> None:
    """The micro-batch stays as it is until what the graphs held is given back."""
    plan = ExecutionPlan(captured=True, micro_batch_size=4, gradient_accumulation_steps=1, packing=True)
    first = session(plan)._smaller(RuntimeError())
    assert (first.captured, first.micro_batch_size, first.gradient_accumulation_steps) == (False, 4, 1)
    second = session(first)._smaller(RuntimeError())
    assert (second.captured, second.micro_batch_size, second.gradient_accumulation_steps) == (False, 2, 2)
    assert second.tokens_per_pass < first.tokens_per_pass == 24


@pytest.mark.parametrize("captured", [True, False])
def test_a_job_that_is_to_fail_then_fails(captured: bool) -> None:
    plan = ExecutionPlan(captured=captured, micro_batch_size=4, gradient_accumulation_steps=1)
    with pytest.raises(GpuOutOfMemory, match="at micro-batch 4"):
        session(plan, recovery={"onOutOfMemory": "Fail"})._smaller(RuntimeError())


def test_a_trial_beside_others_that_has_no_smaller_micro_batch_left_is_to_train_alone() -> None:
    plan = ExecutionPlan(micro_batch_size=1, gradient_accumulation_steps=4)
    beside = session(plan)
    beside.place = object()
    with pytest.raises(WontFit, match="at micro-batch 1"):
        beside._smaller(RuntimeError())
    with pytest.raises(GpuOutOfMemory, match="at micro-batch 1"):
        session(plan)._smaller(RuntimeError())
