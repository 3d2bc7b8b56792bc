"""How long a sweep takes: steps, turns, and what early stopping saves."""

from pathlib import Path
from typing import Any

import pytest

from finetune_api.spec import FineTuneJob
from finetune_api.spec_pack import Halving
from finetune_cli import duration
from finetune_cli.duration import Duration


def job(**changes: Any) -> FineTuneJob:
    spec = {
        "model": {"source": "hf://a/b"},
        "dataset": {"train": "s3://data/x.jsonl"},
        "output": {"uri": "s3://adapters/x"},
    }
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "x"}}
    return FineTuneJob.model_validate(body | {"spec": spec | changes}, by_alias=True, by_name=False)


def test_steps_are_those_of_the_spec_or_of_the_rows_of_one_local_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "x"}\n\n' * 33)
    local = {"dataset": {"train": f"file://{file}"}}
    assert duration.steps_of(job(training={"maxSteps": 7})) == 7
    assert duration.steps_of(job(**local, training={"batchSize": 16, "epochs": 2})) == 6
    assert duration.steps_of(job()) is None
    assert duration.steps_of(job(dataset={"train": f"file://{tmp_path}/gone.jsonl"})) is None


@pytest.mark.parametrize(
    ("seconds", "at_a_time", "whole"),
    [([3, 3, 3], 1, 9), ([3, 3, 3], 3, 3), ([5, 1, 1, 1], 2, 5), ([], 4, 0), ([2], 9, 2)],
)
def test_trials_take_their_turns(seconds: list[float], at_a_time: int, whole: float) -> None:
    assert duration.one_after_the_other(seconds, at_a_time) == whole


def test_early_stopping_saves_what_those_that_fall_behind_do_not_train() -> None:
    trials = [Duration(100, 1.0, start=0)] * 16
    assert duration.with_halving(trials, Halving(rungs=[10, 40], reduction_factor=4)) == 16 * (10 + 30 / 4 + 60 / 16)
    assert duration.with_halving(trials, Halving(rungs=[500])) == 1600


def test_the_gpu_is_the_one_asked_for_or_the_one_of_the_node_selector() -> None:
    labelled = job(resources={"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}})
    assert duration.gpu_of(labelled, None) == "H100"
    assert duration.gpu_of(labelled, "l4") == "L4"
    assert duration.gpu_of(job(), None) is None
    with pytest.raises(Exception, match="'abacus' is not in the speed table"):
        duration.gpu_of(job(), "abacus")
