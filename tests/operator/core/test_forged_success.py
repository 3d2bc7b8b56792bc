"""A pod that lies: whoever gets at it can exit 0 and write any report. Users follow what the status then says."""

from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api.status import TrainerReport
from support.simulation.api import check_status
from support.simulation.world import World, adapter_report

GOOD = adapter_report()["adapter"]


def after(report: Any, **spec: Any) -> World:
    """The job once its only attempt has exited 0 with that report."""
    world = World(recovery={"maxAttempts": 1}, **spec)
    world.settle()
    world.start_pods()
    world.exit_pods(0, report)
    world.settle()
    return world


@pytest.mark.parametrize(
    "changes",
    [
        {"uri": "s3://evil/nli"},
        {"uri": "s3://adapters/nli/below"},
        {"uri": "s3://adapters"},
        {"uri": "s3://adapters/nli/../other"},
        {"uri": "s3://adapters/nli\x1b[2J"},
        {"uri": "file:///etc"},
        {"uri": ""},
        {"uri": "s3://adapters/nli" + "/" * 2000},
        {"manifestDigest": ""},
        {"manifestDigest": "sha256:" + "0" * 63},
        {"manifestDigest": "sha256:" + "0" * 64 + "\n"},
        {"manifestDigest": "md5:" + "0" * 32},
        {"sizeBytes": -1},
        {"sizeBytes": 2**60},
        {"baseModel": "m" * 2000},
        {"rank": "many"},
    ],
    ids=str,
)
def test_a_forged_report_is_no_success(changes: dict[str, Any]) -> None:
    world = after(adapter_report(adapter=GOOD | changes))
    assert (world.outcome, world.reasons) == ("False", ["ReportLost"])
    assert "adapter" not in world.status
    assert world.condition("Published")["status"] == "False"
    check_status(world.status)


def test_an_adapter_elsewhere_is_named_with_the_rule() -> None:
    message = after(adapter_report(adapter=GOOD | {"uri": "s3://evil/nli"})).condition("Succeeded")["message"]
    assert "reported an adapter at s3://evil/nli, which is not output.uri" in message


@pytest.mark.parametrize("slash", ["", "/"])
def test_what_the_operator_cannot_see_it_calls_reported(slash: str) -> None:
    world = after(adapter_report(), output={"uri": f"s3://adapters/nli{slash}"})
    assert world.outcome == "True"
    published = world.condition("Published")
    assert (published["status"], published["reason"]) == ("True", "Reported")
    assert published["message"].startswith("the trainer reports that it published the adapter at s3://adapters/nli")


def test_what_is_kept_of_a_report_is_bounded() -> None:
    report = TrainerReport.model_validate(
        adapter_report(
            message="m" * 100_000,
            reason="r" * 100_000,
            metrics={f"metric{number}": 0.5 for number in range(10_000)} | {"n" * 10_000: 1.0},
        )
    )
    assert (len(report.message), len(report.reason or ""), len(report.metrics)) == (4096, 64, 256)
    with pytest.raises(ValidationError):
        TrainerReport.model_validate(adapter_report(progress={"summary": "s" * 65}))


def test_a_loss_has_the_digits_that_matter() -> None:
    world = World()
    world.settle()
    world.start_pods()
    world.says(step=5, totalSteps=10, loss=2.3456789012345678, learningRate=0.0001999999999, tokensPerSecond=1e-320)
    assert world.status["progress"]["loss"] == 2.3457
    assert world.status["progress"]["learningRate"] == 0.0002
    world.says(step=6, totalSteps=10, loss=1.7976931348623157e308)
    check_status(world.status)
