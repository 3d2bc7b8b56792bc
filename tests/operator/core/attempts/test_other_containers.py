"""Other containers in the trainer's pod: the trainer's own end decides, and a report that they cut is read."""

import json
from typing import Any

import pytest

from finetune_operator.core.attempts.last_words import final_report
from finetune_operator.core.objects.pod import Pod
from support.simulation.world import World, adapter_report

Object = dict[str, Any]


def beside_a_proxy(**spec: Any) -> World:
    """A running attempt whose pods hold another container, which never ends."""
    world = World(**spec)
    world.settle()
    world.start_pods()
    for name in world.live_pods():
        proxy = {"name": "istio-proxy", "state": {"running": {}}}
        world.pods[name]["status"]["containerStatuses"].append(proxy)
        world.changed("Pod", world.pods[name])
    world.settle()
    return world


def trainer_ends(world: World, code: int, message: str = "", *names: str) -> None:
    for name in names or world.live_pods():
        world.end_pod(name, code, message)
        world.pods[name]["status"]["phase"] = "Running"
        world.changed("Pod", world.pods[name])
    world.settle()


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_container_that_never_ends_delays_success_by_half_a_minute(nodes: int):
    world = beside_a_proxy(resources={"nodes": nodes}, activeDeadlineSeconds=50)
    trainer_ends(world, 0, json.dumps(adapter_report()))
    assert world.outcome == "Unknown"
    assert "waiting for container istio-proxy" in world.condition("Training")["message"]
    left = world.plan().requeue_after
    assert left == 30
    world.advance(30)
    world.settle()
    assert (world.outcome, world.reasons) == ("True", ["Succeeded"])
    assert not world.runnable(), "its Job is deleted, and the container with it"


def test_a_container_that_never_ends_hides_no_failure():
    world = beside_a_proxy(recovery={"maxAttempts": 2, "backoffSeconds": 100})
    trainer_ends(world, 1, "OSError: No space left on device")
    world.advance(30)
    world.settle()
    assert world.reasons == ["TrainerCrashed"]
    world.advance(100)
    world.settle()
    assert list(world.jobs) == ["nli-2"], "the first one's Job is deleted before"
    assert "No space left" in world.status["attempts"][0]["message"]


def test_one_rank_that_failed_beside_a_container_ends_the_attempt_though_the_other_hangs():
    world = beside_a_proxy(resources={"nodes": 2}, recovery={"backoffSeconds": 1})
    first, second = sorted(world.live_pods())
    trainer_ends(world, 69, "", second)
    world.advance(30)
    world.settle()
    assert world.reasons == ["Unavailable"]
    world.advance(60)
    world.settle()
    assert not world.jobs, "the other may still write"
    world.end_pod(first, 75)
    world.settle()
    assert list(world.jobs) == ["nli-2"]


def test_the_first_trainer_is_done_and_another_hangs_which_is_a_stall():
    world = beside_a_proxy(resources={"nodes": 2}, activeDeadlineSeconds=10_000)
    first, _ = sorted(world.live_pods())
    trainer_ends(world, 0, "", first)
    assert world.condition("Training")["reason"] == "Finishing"
    world.advance(world.settings.stalled_seconds)
    world.settle()
    assert world.condition("Training")["reason"] == "Stalled"
    world.advance(10_000)
    world.settle()
    assert world.condition("Succeeded")["reason"] == "DeadlineExceeded"


def test_a_container_that_fails_after_the_adapter_is_published_costs_nothing():
    world = beside_a_proxy()
    (name,) = world.live_pods()
    world.end_pod(name, 0, json.dumps(adapter_report()))
    world.pods[name]["status"]["phase"] = "Failed"
    world.changed("Pod", world.pods[name])
    world.conclude("Failed", reason="BackoffLimitExceeded")
    world.settle()
    assert (world.outcome, world.reasons) == ("True", ["Succeeded"])


def test_a_trainer_that_exits_0_and_whose_report_is_lost_is_not_called_a_lost_pod():
    world = beside_a_proxy()
    (name,) = world.live_pods()
    world.end_pod(name, 0)
    world.conclude("Failed", reason="BackoffLimitExceeded")
    world.settle()
    assert world.reasons[0] == "ReportLost"


# Reports that were cut


def pod_with(message: str) -> Pod:
    state = {"terminated": {"exitCode": 0, "message": message}}
    status = {"phase": "Failed", "containerStatuses": [{"name": "trainer", "state": state}]}
    return Pod.from_api({"metadata": {"name": "p", "uid": "u"}, "spec": {}, "status": status})


def test_a_report_that_is_cut_anywhere_is_read_as_far_as_it_is_whole():
    whole = adapter_report(1234, message="published, grüße", metrics={"evalLoss": 0.4102})
    order = ("adapter", "stage", "reason", "progress", "metrics", "message")
    text = json.dumps({key: whole[key] for key in order}, ensure_ascii=False)
    full = final_report(pod_with(text))
    assert full is not None
    needed = text.index('"progress"') - len(", ")
    for length in range(len(text)):
        found = final_report(pod_with(text[:length]))
        assert (found is not None) == (length >= needed), text[:length]
        if found:
            assert (found.stage, found.adapter) == ("Succeeded", full.adapter)
            assert found.progress in (full.progress, type(full.progress)()), "no part of a number"
            assert found.metrics in (full.metrics, {}) and found.message in (full.message, "")


@pytest.mark.parametrize("cut", ["�", "\n{", ' "x', "\x00"])
def test_what_is_no_report_is_none(cut: str):
    assert final_report(pod_with('{"event": "Step 7", "level": "info"}' + cut)) is None
    assert final_report(pod_with(cut)) is None


def test_one_field_that_cannot_be_read_costs_no_other():
    report = adapter_report(metrics="none", executionPlan={"microBatchSize": "many"})
    found = final_report(pod_with(json.dumps(report)))
    assert found is not None and found.adapter is not None and found.metrics == {}


def test_a_success_whose_report_was_cut_before_its_end_is_a_success():
    world = beside_a_proxy()
    (name,) = world.live_pods()
    text = json.dumps({key: adapter_report()[key] for key in ("adapter", "stage", "reason", "progress")})
    world.end_pod(name, 0, text[:-20])
    world.conclude("Complete")
    world.settle()
    assert (world.outcome, world.reasons) == ("True", ["Succeeded"])
