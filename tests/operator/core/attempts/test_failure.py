"""Which pod an ended attempt is blamed on, and what its end is called."""

import json

import pytest

from finetune_api import exit_codes
from finetune_operator.core.attempts import failure
from support.simulation.world import World, stamp

OUT_OF_MEMORY = {"stage": "Failed", "reason": "GpuOutOfMemory", "message": "x", "executionPlan": {"microBatchSize": 8}}


def started(**spec: object) -> World:
    world = World(**spec)
    world.settle()
    world.start_pods()
    world.settle()
    return world


def drained_and_replaced(**spec: object) -> World:
    """The pod of attempt 1 was drained, saved, and replaced within its Job."""
    world = started(**spec)
    world.exit_pods(
        exit_codes.ExitCode.PREEMPTED, {"stage": "Failed", "reason": "Preempted"}, disrupted="evicted by API"
    )
    world.settle()
    world.advance(60)
    world.start_pods()
    world.settle()
    assert world.reasons == [None] and list(world.jobs) == ["nli-1"]
    world.advance(600)
    return world


@pytest.mark.parametrize(
    ("code", "report", "reason"),
    [
        (65, {"stage": "Failed", "reason": "DatasetInvalid", "message": "row 7"}, "DatasetInvalid"),
        (90, OUT_OF_MEMORY, "GpuOutOfMemory"),
        (1, None, "TrainerCrashed"),
        (137, None, "Killed"),
        (75, None, "Preempted"),
    ],
)
def test_a_pod_that_was_replaced_within_its_job_does_not_explain_the_jobs_end(code, report, reason):
    world = drained_and_replaced()
    world.exit_pods(code, report)
    world.settle()
    assert world.status["attempts"][0] | {"reason": reason, "exitCode": code} == world.status["attempts"][0]


def test_the_replacement_may_be_made_in_the_second_in_which_the_first_pod_ended():
    world = started()
    world.exit_pods(exit_codes.ExitCode.PREEMPTED, disrupted="evicted by API")
    world.start_pods()
    world.settle()
    world.exit_pods(65)
    world.settle()
    assert world.reasons == ["DatasetInvalid"]


@pytest.mark.parametrize("reason", ["Error", "ContainerStatusUnknown"])
def test_a_kill_that_is_not_for_memory_is_retried_and_counted(reason: str):
    world = started(recovery={"maxAttempts": 2, "backoffSeconds": 1})
    for _ in range(2):
        world.exit_pods(137, reason=reason)
        world.settle()
        world.advance(10)
        world.settle()
        world.start_pods()
        world.settle()
    assert world.reasons == ["Killed", "Killed"]
    assert world.condition("Succeeded")["message"].startswith("2 of 2 attempts failed")


def test_out_of_host_memory_names_the_limit_and_promises_no_peak_that_nobody_measured():
    world = started(resources={"memory": "64Gi"})
    world.exit_pods(137, reason="OOMKilled")
    world.settle()
    assert (world.reasons, world.outcome) == (["OOMKilled"], "False")
    assert "reached its limit of 64Gi (resources.memory)" in world.condition("Succeeded")["message"]
    assert "peak" not in exit_codes.REASONS["OOMKilled"].cure


@pytest.mark.parametrize(
    ("said", "reason"), [("WontFit", "WontFit"), (None, "ConfigInvalid"), ("Diverged", "ConfigInvalid")]
)
def test_the_report_tells_which_of_two_reasons_an_exit_code_stands_for(said, reason):
    world = started()
    world.exit_pods(78, {"stage": "Failed", "reason": said, "message": "see the message"})
    world.settle()
    assert (world.reasons, world.outcome) == ([reason], "False")


def test_a_trainer_cannot_call_itself_out_of_memory():
    world = started()
    world.exit_pods(137, {"stage": "Failed", "reason": "OOMKilled", "message": "so it says"})
    world.settle()
    assert world.reasons[0] == "Killed"


def test_a_rank_that_was_killed_for_the_lack_of_another_is_not_blamed():
    world = started(resources={"nodes": 2})
    first, second = sorted(world.live_pods())
    world.end_pod(first, 137)
    world.advance(5)
    world.end_pod(second, 69)
    world.conclude("Failed")
    world.settle()
    assert world.reasons == ["Unavailable"]


def test_a_crash_for_the_lack_of_a_node_is_the_nodes_loss():
    world = started(resources={"nodes": 2}, recovery={"maxAttempts": 1})
    first, second = sorted(world.live_pods())
    crash = {"stage": "Failed", "reason": "Error", "message": "Unexpected DistBackendError: NCCL error"}
    world.end_pod(first, 1, json.dumps(crash))
    world.end_pod(second, 137, disrupted="PodGC: node no longer exists")
    world.conclude("Failed")
    world.settle()
    assert world.reasons == ["NodeLost"]


LOG = "\n".join(
    [
        "a line of long ago",
        json.dumps({"event": "Loading the model", "stage": "LoadingModel", "level": "info"}),
        "Traceback (most recent call last):",
        "ImportError: libcudart.so.13: cannot open shared object file",
    ]
)


def test_a_crash_before_any_report_shows_the_last_lines_of_the_log():
    world = started()
    world.exit_pods(1, message=LOG)
    world.settle()
    message = world.status["attempts"][0]["message"]
    assert message.startswith("the trainer in pod nli-1-0-")
    assert message.splitlines()[1:] == [
        "Loading the model",
        "Traceback (most recent call last):",
        "ImportError: libcudart.so.13: cannot open shared object file",
    ]


@pytest.mark.parametrize(
    "line",
    [
        {"event": "Step 7", "level": "info"},
        {"event": "Loading the model", "stage": "LoadingModel", "level": "info"},
        {"message": "no stage at all", "progress": {"step": 99}},
    ],
)
def test_one_line_of_the_log_is_no_report_though_it_is_json(line):
    world = started()
    world.exit_pods(3, message=json.dumps(line))
    world.settle()
    assert world.reasons[0] == "TrainerCrashed"
    assert "lastStep" not in world.status["attempts"][0]
    assert str(line.get("event") or line.get("message")) in world.status["attempts"][0]["message"]
    observed = world.observed()
    assert observed is not None and all(failure.final_report(pod) is None for pod in observed.pods)


def test_a_known_exit_code_without_a_report_shows_the_log_as_well():
    world = started()
    world.exit_pods(77, message="403 Forbidden: s3://data")
    world.settle()
    assert world.condition("Succeeded")["message"].endswith("\n403 Forbidden: s3://data")


def test_a_pod_whose_grace_was_too_short_was_preempted():
    world = started()
    world.stop_pods("nli-1")
    world.exit_pods(137)
    world.settle()
    assert world.reasons[0] == "Preempted"
    assert world.status["attempts"][0]["finishedAt"] == stamp(world.now)


@pytest.mark.parametrize("levels", [150, 1_000, 4_096])
@pytest.mark.parametrize("opening", ["[", '{"event":'])
def test_last_lines_that_nest_deeper_than_a_parser_goes_are_text(opening: str, levels: int):
    world = started(recovery={"maxAttempts": 1})
    world.exit_pods(1, message=opening * levels)
    world.settle()
    assert world.status["attempts"][0]["reason"] == "TrainerCrashed"
    assert opening * 10 in world.status["attempts"][0]["message"]
