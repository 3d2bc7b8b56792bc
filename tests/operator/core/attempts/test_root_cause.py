"""Two ranks end in every pair of ways: the one that explains the failure is told, whatever the other says."""

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.core.attempts import root_cause
from finetune_operator.core.objects.pod import Pod
from support.simulation.cluster import stamp
from support.simulation.world import World, adapter_report

Object = dict[str, Any]
NO_SPACE = "OSError: [Errno 28] No space left on device"
STORAGE = 'Usage of EmptyDir volume "scratch" exceeds the limit "1Gi". '


def report(reason: str, message: str) -> str:
    return json.dumps({"stage": "Failed", "reason": reason, "message": message})


@dataclass(frozen=True)
class End:
    """How a pod ends by itself, and what an attempt that it explains says: `reason`, and a part of its sentence."""

    reason: str
    sentence: str
    weight: int
    code: int = 1
    message: str = ""
    container: str = "Error"
    status: Object = field(default_factory=dict)
    disrupted: str = ""
    told: bool = False
    """Whether somebody deleted the pod."""


ENDS = {
    "data": End("DatasetInvalid", "row 7", 0, 65, report("DatasetInvalid", "row 7")),
    "memory": End("OOMKilled", "host memory reached", 0, 137, container="OOMKilled"),
    "gpu memory": End("GpuOutOfMemory", "at micro-batch 8", 0, 90, report("GpuOutOfMemory", "at micro-batch 8")),
    "by torchrun": End("Diverged", "NaN", 0, 1, report("Diverged", "NaN")),
    "storage": End(
        "StorageLimitExceeded",
        'volume "scratch" exceeds the limit "1Gi"',
        0,
        137,
        status={"reason": "Evicted", "message": STORAGE},
    ),
    "pod deadline": End(
        "JobDeadlineExceeded",
        "an admission policy or a webhook has",
        0,
        75,
        report("Preempted", "saved"),
        status={"reason": "DeadlineExceeded"},
    ),
    "drained": End("NodeLost", "evicted by API", 1, 137, disrupted="evicted by API"),
    "no space": End("TrainerCrashed", "No space left", 2, 1, NO_SPACE),
    "error": End("TrainerCrashed", "NCCL error", 2, 1, report("Error", "NCCL error")),
    "killed": End("Killed", "The container was killed", 2, 137),
    "deleted": End("Preempted", "deleted before it could save", 2, 137, told=True),
    "saved": End("Preempted", "checkpoint saved", 3, 75, report("Preempted", "checkpoint saved"), told=True),
}
#: What a pod says that the Job controller stopped because the other had failed.
FOLLOWS = {
    "saved": (75, report("Preempted", "checkpoint saved by the other")),
    "saved, then killed": (137, report("Preempted", "checkpoint saved by the other")),
    "killed": (137, ""),
    "crashed": (1, report("Error", "connection closed by peer")),
    "no word": (1, ""),
}


def two_ranks() -> tuple[World, list[str]]:
    world = World(resources={"nodes": 2}, recovery={"maxAttempts": 2, "backoffSeconds": 1})
    world.settle()
    world.start_pods()
    world.settle()
    return world, sorted(world.live_pods())


def end(world: World, pod: str, how: End) -> None:
    if how.told:
        world.stop_pod(pod)
        world.advance(1)
    world.end_pod(pod, how.code, how.message, how.container, how.disrupted)
    world.pods[pod]["status"] |= how.status
    world.changed("Pod", world.pods[pod])


def told(world: World) -> Object:
    world.conclude("Failed")
    world.settle()
    return dict(world.status["attempts"][0])


@pytest.mark.parametrize("follows", FOLLOWS)
@pytest.mark.parametrize("first", ENDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_the_job_stopped_for_the_others_failure_explains_nothing(rank: int, first: str, follows: str):
    world, pods = two_ranks()
    end(world, pods[rank], ENDS[first])
    world.advance(2)
    world.stop_pods("nli-1")
    world.advance(20)
    code, message = FOLLOWS[follows]
    world.end_pod(pods[1 - rank], code, message)
    attempt = told(world)
    assert attempt["reason"] == ENDS[first].reason
    assert ENDS[first].sentence in attempt["message"]
    assert "the other" not in attempt["message"]


@pytest.mark.parametrize(("first", "second"), itertools.product(ENDS, ENDS))
def test_of_two_ends_the_one_that_explains_more_is_told_and_of_equals_the_first(first: str, second: str):
    world, pods = two_ranks()
    end(world, pods[0], ENDS[first])
    world.advance(3)
    later = ENDS[second]
    end(world, pods[1], later)
    follows = later.told  # it was told to stop after the first had ended, which nobody can tell from the Job's doing
    expected = later if later.weight < ENDS[first].weight and not follows else ENDS[first]
    attempt = told(world)
    assert (attempt["reason"], expected.sentence in attempt["message"]) == (expected.reason, True), attempt


def test_the_real_cause_is_counted_and_the_attempts_end():
    world, _ = two_ranks()
    for _ in range(2):
        pods = sorted(world.live_pods())
        world.end_pod(pods[1], 1, NO_SPACE)
        world.advance(1)
        world.stop_pods(f"nli-{len(world.reasons)}")
        world.end_pod(pods[0], 75, report("Preempted", "saved"))
        world.conclude("Failed")
        world.remove_pods()
        world.settle()
        world.advance(60)
        world.settle()
        world.start_pods()
        world.settle()
    assert (world.outcome, world.reasons) == ("False", ["TrainerCrashed"] * 2)
    assert "No space left on device" in world.condition("Succeeded")["message"]


def test_a_job_deadline_that_a_policy_sets_is_told_and_counted():
    world, pods = two_ranks()
    world.stop_pods("nli-1")
    world.advance(5)
    for pod in pods:
        world.end_pod(pod, 75, report("Preempted", "saved at step 40"))
    world.conclude("Failed", reason="DeadlineExceeded", message="Job was active longer than specified deadline")
    world.settle()
    (attempt,) = world.status["attempts"]
    assert attempt["reason"] == "JobDeadlineExceeded"
    assert "DeadlineExceeded: Job was active longer than specified deadline" in attempt["message"]
    assert "saved at step 40" in attempt["message"]


@pytest.mark.parametrize("deadline", [True, False])
@pytest.mark.parametrize("code", [0, 1, 134, 137])
def test_a_success_that_was_reported_stands_however_container_and_job_ended_after_it(code: int, deadline: bool):
    world, pods = two_ranks()
    world.end_pod(pods[0], code, json.dumps(adapter_report()))
    world.end_pod(pods[1], 1, report("Error", "connection closed by peer"))
    world.conclude("Failed", reason="DeadlineExceeded" if deadline else "BackoffLimitExceeded")
    world.settle()
    assert (world.outcome, world.reasons) == ("True", ["Succeeded"])
    assert world.status["adapter"]["uri"] == "s3://adapters/nli"


def test_a_pod_that_the_kubelet_refused_is_told_in_its_words():
    world, pods = two_ranks()
    why = "Allocate failed due to no healthy devices present; cannot allocate unhealthy devices nvidia.com/gpu"
    for name in pods:
        status = world.pods[name]["status"]
        status |= {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": why, "containerStatuses": []}
        world.changed("Pod", world.pods[name])
    world.conclude("Failed")
    world.advance(10)
    world.settle()
    attempt = world.status["attempts"][0]
    assert attempt["reason"] == "GpuUnavailable"
    assert f"UnexpectedAdmissionError: {why}" in attempt["message"]


@pytest.mark.parametrize(
    ("asked", "limit", "sentence"),
    [
        (
            None,
            "512Mi",
            "its limit of 512Mi, set by a LimitRange, a webhook or the administrator: set resources.memory",
        ),
        ("64Gi", "64Gi", "its limit of 64Gi (resources.memory)"),
        ("64Gi", "", "its limit of 64Gi (resources.memory)"),
        (None, "", "what the node could give"),
    ],
)
def test_out_of_host_memory_names_the_limit_in_force_and_who_set_it(asked: str | None, limit: str, sentence: str):
    world = World(**({"resources": {"memory": asked}} if asked else {}))
    world.settle()
    world.start_pods()
    (name,) = world.live_pods()
    container = {"name": "trainer", "resources": {"limits": {"memory": limit}}} if limit else {"name": "trainer"}
    world.pods[name]["spec"]["containers"] = [container]
    world.exit_pods(137, reason="OOMKilled")
    world.settle()
    assert sentence in world.condition("Succeeded")["message"]


# Whatever pods say


def pod(number: int, end: End, ended: int, stopped: int | None) -> Pod:
    world = World()
    metadata: Object = {"name": f"nli-1-{number}", "uid": f"u{number}", "namespace": "team"}
    metadata["annotations"] = {"batch.kubernetes.io/job-completion-index": str(number)}
    if stopped is not None:
        world.advance(stopped)
        metadata |= {"deletionTimestamp": stamp(world.now), "deletionGracePeriodSeconds": 0}
        world.advance(-stopped)
    world.advance(ended)
    ended_state = {"exitCode": end.code, "reason": end.container, "message": end.message}
    state = {"terminated": ended_state | {"finishedAt": stamp(world.now)}}
    status: Object = {"phase": "Failed", "containerStatuses": [{"name": "trainer", "state": state}], **end.status}
    if end.disrupted:
        status["conditions"] = [{"type": "DisruptionTarget", "status": "True", "message": end.disrupted}]
    return Pod.from_api({"metadata": metadata, "spec": {}, "status": status})


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(ENDS)), st.integers(0, 4), st.none() | st.integers(0, 4)),
        min_size=1,
        max_size=5,
    ),
    st.randoms(use_true_random=False),
)
def test_the_ranking_is_total_and_knows_no_order_of_the_pods(ends: list[tuple[str, int, int | None]], chance: Any):
    pods = [pod(number, ENDS[name], ended, stopped) for number, (name, ended, stopped) in enumerate(ends)]
    found = root_cause.find(pods)
    assert found is not None
    shuffled = list(pods)
    chance.shuffle(shuffled)
    assert root_cause.find(shuffled) == found
    least = min(root_cause.weigh(each, pods) for each in pods)
    assert root_cause.weigh(found, pods) == least
    if any(not root_cause.was_told_to_stop(each) for each in pods):
        assert least is not root_cause.Weight.FOLLOWED


def test_ranks_that_were_told_to_stop_do_not_speak_for_one_whose_pod_nobody_saw_end():
    """The operator was down while a job that cleans up deleted the failed pod."""
    world = World(lag=True, resources={"nodes": 3}, training={"batchSize": 24}, recovery={"maxAttempts": 2})
    for _ in range(2):
        world.settle()
        world.start_pods()
        world.settle()
        *others, guilty = sorted(world.live_pods())
        world.end_pod(guilty, 1, NO_SPACE)
        del world.pods[guilty]
        for pod in others:
            world.stop_pod(pod)
            world.end_pod(pod, 75, report("Preempted", "checkpoint saved"))
        world.conclude("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
        world.restart()
        world.advance(700)
        world.settle()
    assert (world.outcome, world.reasons) == ("False", ["PodLost", "PodLost"])
    said = (
        "the pod of a rank is gone, and the others were only told to stop: Job has reached the specified backoff limit"
    )
    assert said in world.status["attempts"][0]["message"]
