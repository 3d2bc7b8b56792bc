"""A job whose adapter does not pass its gate has succeeded, says so with both numbers, and publishes nothing."""

from typing import Any

import pytest

from support.simulation.api import check_status
from support.simulation.world import World, adapter_report

GATE = [{"metric": "f1", "value": 0.87, "comparison": "atLeast", "bar": 0.9, "passed": False}]
SAID = "not published: f1 0.87, at least 0.9 is asked"
CANDIDATE = "s3://adapters/nli/candidates/nli-{}"


GATED: dict[str, Any] = {
    "publish": {"onlyIf": [{"metric": "f1", "atLeast": 0.9}]},
    "evaluation": {"metrics": ["loss", "nli"]},
    "dataset": {"train": "s3://data/train.jsonl", "eval": "s3://data/eval.jsonl"},
}


def ended(candidate: str = CANDIDATE, spec: dict[str, Any] = GATED, **more: Any) -> World:
    world = World(recovery={"maxAttempts": 1}, **spec)
    world.settle()
    world.start_pods()
    mark = "".join(filter(str.isalnum, world.job["metadata"]["uid"]))[:8]
    report = adapter_report(gate=GATE, reason="GateNotPassed", message=SAID) | more
    report["candidate"] = report["adapter"] | {"uri": candidate.format(mark)}
    if "adapter" not in more:
        del report["adapter"]
    world.exit_pods(0, report)
    world.settle()
    return world


def test_it_succeeds_and_is_not_published() -> None:
    world = ended(metrics={"f1": 0.87})
    check_status(world.status)
    assert (world.outcome, world.reasons) == ("True", ["GateNotPassed"])
    for kind, status in (("Succeeded", "True"), ("Published", "False")):
        found = world.condition(kind)
        assert (found["status"], found["reason"], found["message"]) == (
            status,
            "GateNotPassed",
            SAID,
        )
    assert world.condition("Finished")["status"] == "True"
    assert "adapter" not in world.status
    assert world.status["candidate"]["uri"].startswith("s3://adapters/nli/candidates/nli-")
    assert world.status["gate"] == GATE
    assert world.status["metrics"] == {"f1": 0.87}
    assert "GateNotPassed" in world.events
    assert "AttemptEnded" not in world.events
    world.advance(600)
    world.settle()
    assert len(world.status["attempts"]) == 1


@pytest.mark.parametrize(
    "candidate",
    [
        "s3://evil/nli/candidates/nli-{}",
        "s3://adapters/nli",
        "s3://adapters/nli/candidates/other-{}",
        "s3://adapters/nli/candidates/nli-{}/below",
        "s3://adapters/nli/candidates/nli-{}/../../..",
    ],
)
def test_a_forged_candidate_is_no_success(candidate: str) -> None:
    world = ended(candidate)
    assert (world.outcome, world.reasons) == ("False", ["ReportLost"])
    assert "which is not where this job keeps one" in world.status["attempts"][0]["message"]
    assert "candidate" not in world.status


def test_a_job_without_a_gate_keeps_no_candidate() -> None:
    world = ended(spec={})
    assert (world.outcome, world.reasons) == ("False", ["ReportLost"])
    assert "candidate" not in world.status


def test_a_gate_that_cannot_be_read_never_turns_a_candidate_into_a_publication() -> None:
    world = ended(gate=[{"metric": 7}] * 99)
    assert (world.outcome, world.condition("Published")["status"]) == ("True", "False")
    assert world.status.get("gate", []) == []


def test_conditions_that_are_met_stand_beside_the_adapter() -> None:
    world = World()
    world.settle()
    world.start_pods()
    met = [GATE[0] | {"value": 0.95, "passed": True}]
    world.exit_pods(0, adapter_report(gate=met))
    world.settle()
    assert (world.outcome, world.condition("Published")["status"]) == ("True", "True")
    assert world.status["gate"] == met
    assert "candidate" not in world.status


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_does_not_have_do_not_keep_the_job_from_its_end(number: float) -> None:
    gate = [GATE[0] | {"value": number, "bar": number}]
    world = ended(gate=gate)
    check_status(world.status)
    assert world.outcome == "True"
    assert world.status["gate"] == [{key: GATE[0][key] for key in ("metric", "comparison", "passed")}]
    published = World(recovery={"maxAttempts": 1})
    published.settle()
    published.start_pods()
    beside = {"name": "merged", "uri": "s3://adapters/nli/merged", "loss": number, "adapterLoss": number}
    published.exit_pods(0, adapter_report(artifacts=[beside]))
    published.settle()
    check_status(published.status)
    assert published.outcome == "True"
    assert published.status["artifacts"] == [{"name": "merged", "uri": "s3://adapters/nli/merged"}]
