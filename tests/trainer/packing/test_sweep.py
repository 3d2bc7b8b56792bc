"""How the trials of one process end, and what is told of each."""

import math
from pathlib import Path

import pytest

from finetune_api.spec_pack import MAX_PACK
from finetune_api.status import Adapter, Progress, Stage, TrainerReport
from finetune_api.sweep import FineTuneSweep
from finetune_api.trial_report import TrialReport
from finetune_trainer.errors import Failure
from finetune_trainer.packing.sweep import TrialFailed, conclude
from finetune_trainer.packing.table import row, stage_of, total_steps
from finetune_trainer.reporting.report import MAX_WITH_TRIALS, Reporter, termination_message

SWEEP = FineTuneSweep.model_validate(
    {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneSweep",
        "metadata": {"name": "nli"},
        "spec": {
            "template": {
                "model": {"source": "hf://org/model"},
                "dataset": {"train": "s3://data/train.jsonl", "eval": "s3://data/eval.jsonl"},
                "output": {"uri": "s3://out"},
            },
            "trials": [{"name": "a"}, {"name": "b"}],
        },
    }
)
ADAPTER = Adapter(
    uri="s3://bucket/" + "a" * 1012,
    manifest_digest="sha256:" + "0" * 64,
    size_bytes=10**12,
    base_model="s3://bucket/" + "m" * 1012,
    rank=256,
)
PUBLISHED = TrainerReport(stage="Succeeded", reason="Succeeded", adapter=ADAPTER, metrics={"evalLoss": 0.25})
DIVERGED, UNREACHABLE = Failure(91, "Diverged", "loss is NaN"), Failure(69, "Unavailable", "no answer")
UNFORESEEN, STOPPED = Failure(1, "Error", "a bug"), Failure(75, "Preempted", "asked to stop")
FAILED = TrainerReport(stage="Failed")


def test_a_failure_that_another_attempt_would_meet_again_takes_no_other_along() -> None:
    reporter = Reporter()
    conclude(SWEEP, [("a", FAILED, DIVERGED), ("b", PUBLISHED, None)], reporter)
    assert (reporter.report.stage, reporter.report.adapter) == ("Succeeded", ADAPTER)
    assert reporter.report.message.endswith("the best is b, evalLoss 0.25; a failed: loss is NaN")


@pytest.mark.parametrize("failure", [UNREACHABLE, UNFORESEEN, STOPPED], ids=lambda failure: failure.reason)
def test_one_that_another_attempt_could_mend_ends_the_process(failure: Failure) -> None:
    with pytest.raises(TrialFailed, match="1 of 3 adapters are published; trial c: ") as found:
        conclude(SWEEP, [("a", FAILED, DIVERGED), ("b", PUBLISHED, None), ("c", FAILED, failure)], Reporter())
    assert found.value.exit_code == failure.exit_code


def test_where_none_is_published_the_process_ends_as_the_trial_that_may_do_better() -> None:
    with pytest.raises(TrialFailed, match="0 of 2 adapters are published; trial b: no answer") as found:
        conclude(SWEEP, [("a", FAILED, DIVERGED), ("b", FAILED, UNREACHABLE)], Reporter())
    assert (found.value.exit_code, found.value.reason) == (69, "Unavailable")


def test_trials_that_all_missed_their_gate_are_an_end_that_is_told(tmp_path: Path) -> None:
    kept = TrainerReport(stage="Succeeded", reason="GateNotPassed", candidate=ADAPTER, message="not published: f1")
    reporter = Reporter(tmp_path / "log")
    conclude(SWEEP, [("a", kept, None), ("b", kept, None)], reporter)
    found = TrainerReport.model_validate_json((tmp_path / "log").read_bytes())
    assert (found.stage, found.reason) == ("Succeeded", "GateNotPassed")
    assert found.candidate and found.candidate.uri == ADAPTER.uri


@pytest.mark.parametrize(
    ("report", "failure", "told"),
    [
        (TrainerReport(), None, {"phase": "Pending"}),
        (TrainerReport(stage="LoadingModel"), None, {"phase": "Running"}),
        (
            TrainerReport(stage="Training", progress=Progress(step=7, eval_loss=0.5)),
            None,
            {"phase": "Running", "step": 7, "evalLoss": 0.5},
        ),
        (PUBLISHED, None, {"phase": "Succeeded", "value": 0.25}),
        (FAILED, DIVERGED, {"phase": "Failed", "reason": "Diverged"}),
        (FAILED, STOPPED, {"phase": "Running"}),
        (
            TrainerReport(stage="Succeeded", reason="Outperformed", progress=Progress(step=4)),
            None,
            {"phase": "Stopped", "reason": "Outperformed", "step": 4},
        ),
        (
            TrainerReport(stage="Succeeded", reason="GateNotPassed", candidate=ADAPTER),
            None,
            {"phase": "Failed", "reason": "GateNotPassed"},
        ),
    ],
    ids=str,
)
def test_the_row_of_a_trial(report: TrainerReport, failure: Failure | None, told: dict[str, object]) -> None:
    assert row("a", report, failure, "evalLoss").manifest() == {"name": "a"} | told


def test_the_process_does_what_its_trials_do() -> None:
    def doing(*stages: Stage) -> Stage:
        return stage_of([TrainerReport(stage=stage) for stage in stages], "Starting")

    assert doing("Starting", "Starting") == "Starting"
    assert doing("LoadingModel", "Starting") == "LoadingModel"
    assert doing("Evaluating", "Training") == "Training"
    assert doing("Publishing", "Succeeded") == "Publishing" and doing("Succeeded", "Failed") == "Starting"


def test_steps_of_trials_that_have_not_begun_are_those_of_the_longest() -> None:
    assert total_steps([Progress(), Progress()]) is None
    assert total_steps([Progress(total_steps=10), Progress(total_steps=4), Progress()]) == 24


@pytest.mark.parametrize("phase", ["Succeeded", "Failed", "Stopped", "Running"])
def test_the_rows_of_the_largest_pack_fit_into_a_termination_message(phase: str) -> None:
    rows = [
        TrialReport.model_validate(
            {
                "name": f"{number:02}".ljust(40, "x"),
                "phase": phase,
                "reason": "StorageLimitExceeded" if phase != "Succeeded" else None,
                "value": -1.2345678e-11 if phase == "Succeeded" else None,
                "step": 2**31,
                "evalLoss": 1.23456789e-5,
            }
        )
        for number in range(MAX_PACK)
    ]
    metrics = {f"confusion.{number}": 1 / 3 for number in range(200)}
    written = termination_message(
        PUBLISHED.model_copy(update={"trials": rows, "message": "é" * 4096, "metrics": metrics})
    )
    assert len(written) <= MAX_WITH_TRIALS == 4096
    found = TrainerReport.model_validate_json(written)
    assert found.adapter and [(each.name, each.phase) for each in found.trials] == [(row.name, phase) for row in rows]


def test_rows_that_cannot_be_read_take_none_along() -> None:
    rows = [
        {"name": "a", "phase": "?"},
        7,
        {"name": "b", "value": math.nan},
        {"name": "b"},
        {"name": "c", "new": 1},
    ]
    found = TrainerReport.model_validate({"trials": rows})
    assert [(each.name, each.value) for each in found.trials] == [("b", None), ("c", None)]
    many = TrainerReport.model_validate({"trials": [{"name": str(number)} for number in range(1000)]})
    assert len(many.trials) == MAX_PACK
