"""Why nothing runs: what is said, for how long it is said, and which clocks run meanwhile."""

from datetime import timedelta

import pytest

from finetune_api import constants, exit_codes
from finetune_operator.core.objects.observed import WaitReason
from support.simulation.world import START, World, stamp

QUEUE = {constants.LABEL_KUEUE_QUEUE: "gpu"}
NO_QUOTA = WaitReason("Queued", "couldn't assign flavors to pod set main: insufficient quota for nvidia.com/gpu")


def started(**spec: object) -> World:
    world = World(**spec)
    world.settle()
    world.kueue_admits()
    world.start_pods()
    world.settle()
    return world


def scheduled(world: World) -> tuple[str, str]:
    world.settle()
    said = world.condition("Scheduled")
    return said["reason"], said["message"]


def pending_pod(world: World, **waiting: str) -> str:
    """The attempt's pod, made and not started."""
    name = world.make_pod(world.jobs["nli-1"])
    pod = world.pods[name]
    pod["status"] = {"phase": "Pending", "containerStatuses": [{"name": "trainer", "state": {"waiting": waiting}}]}
    world.changed("Pod", pod)
    return name


def uid(obj: dict[str, dict[str, str]]) -> str:
    return obj["metadata"]["uid"]


# What is said


def test_kueues_word_is_over_once_it_has_admitted_the_job():
    world = World(labels=QUEUE)
    world.settle()
    world.cache.set_wait_reason("team", uid(world.jobs["nli-1"]), NO_QUOTA)
    assert scheduled(world) == ("Queued", f"waiting in queue gpu: {NO_QUOTA.message}")
    world.kueue_admits()
    assert scheduled(world) == (
        "Pending",
        "waiting for the pod of Job nli-1 to start; if this lasts: kubectl describe job nli-1 -n team",
    )
    pending_pod(world, reason="ContainerCreating")
    assert scheduled(world)[0] == "Pending"
    assert world.status["phase"] == "Pending"


def test_a_pod_that_takes_long_to_start_is_told_by_what_it_waits_for():
    """Neither the scheduler nor the kubelet has said a word: one of them may not be there."""
    world = World()
    world.settle()
    name = pending_pod(world)
    world.pods[name]["spec"].pop("nodeName", None)
    world.changed("Pod", world.pods[name])
    first = scheduled(world)
    assert first == (
        "Pending",
        "waiting for the pod of Job nli-1 to start; if this lasts: kubectl describe job nli-1 -n team",
    )
    left = world.plan().requeue_after
    assert left == 10, "most pods run by then, and cost no write of this"
    world.advance(left)
    ends = f"; if this lasts: kubectl describe pod {name} -n team"
    nowhere = f"no scheduler has placed pod {name} on a node yet, nor said why not: see that one runs{ends}"
    assert scheduled(world) == ("Pending", nowhere)
    world.pods[name]["spec"]["nodeName"] = "node-7"
    world.changed("Pod", world.pods[name])
    assert scheduled(world) == (
        "Pending",
        f"node node-7 prepares pod {name}: it pulls the image and mounts the volumes{ends}",
    )
    world.pods[name]["status"]["conditions"] = [{"type": "PodReadyToStartContainers", "status": "True"}]
    world.changed("Pod", world.pods[name])
    assert scheduled(world) == ("Pending", f"node node-7 prepares pod {name}: it pulls the image{ends}")
    world.advance(1000)
    assert world.plan().status is None, "the same words, however long it lasts"


def test_a_queued_job_does_not_repeat_what_the_job_controller_said_before():
    world = World(labels=QUEUE)
    world.settle()
    world.cache.set_wait_reason("team", uid(world.jobs["nli-1"]), WaitReason("FailedCreate", "exceeded quota"))
    assert scheduled(world) == ("Queued", "waiting for Kueue to admit it to queue gpu")


def test_the_job_controllers_failure_is_over_once_there_are_pods():
    world = World()
    world.settle()
    world.cache.set_wait_reason("team", uid(world.jobs["nli-1"]), WaitReason("FailedCreate", "exceeded quota", START))
    assert scheduled(world) == ("FailedCreate", "exceeded quota")
    world.advance(5)
    name = pending_pod(world, reason="ContainerCreating")
    assert scheduled(world)[0] == "Pending"
    world.end_pod(name, 137, disrupted="evicted by API")
    assert scheduled(world) == ("Pending", "a pod was lost; Kubernetes is replacing it")
    world.cache.set_wait_reason(
        "team", uid(world.jobs["nli-1"]), WaitReason("FailedCreate", "exceeded again", START + timedelta(seconds=6))
    )
    assert scheduled(world) == ("FailedCreate", "exceeded again")


def test_a_failed_mount_is_over_once_the_volumes_are_mounted():
    world = World()
    world.settle()
    name = pending_pod(world, reason="ContainerCreating")
    world.cache.set_wait_reason("team", uid(world.pods[name]), WaitReason("FailedMount", 'secret "x" not found'))
    assert scheduled(world)[0] == "FailedMount"
    world.pods[name]["status"]["conditions"] = [{"type": "PodReadyToStartContainers", "status": "True"}]
    world.changed("Pod", world.pods[name])
    assert scheduled(world)[0] == "Pending", "the image is being pulled"


def test_a_pod_whose_node_is_gone_is_said_to_be_out_of_reach_and_nothing_new_starts():
    world = started()
    world.stop_pods("nli-1")
    world.settle()
    assert world.condition("Scheduled")["reason"] == "PodsRunning", "it saves its checkpoint"
    left = world.plan().requeue_after
    assert left is not None and 120 <= left <= 200
    world.advance(left)
    reason, message = scheduled(world)
    by = stamp(START + timedelta(seconds=120))
    assert reason == "NodeUnreachable"
    assert "nli-1-0-" in message and f"was due to stop by {by}" in message and "node node-1" in message
    assert world.events.count("NodeUnreachable") == 1
    world.advance(1700)
    assert scheduled(world) == (reason, message), "the same words, however long it lasts"
    assert list(world.jobs) == ["nli-1"]


def test_suspending_says_when_the_pod_is_out_of_reach():
    world = started()
    world.change_spec(suspend=True)
    world.settle()
    world.advance(1700)
    world.settle()
    assert "has not confirmed it" in world.condition("Suspended")["message"]


# Kueue


def evicted(**spec: object) -> World:
    """It ran 100 s, was evicted, saved and stopped."""
    world = started(labels=QUEUE, **spec)
    world.says(step=5, totalSteps=10, tokensPerSecond=9, estimatedCompletionTime=stamp(START + timedelta(hours=1)))
    world.advance(100)
    world.kueue_evicts()
    assert scheduled(world)[0] == "Queued", "also while its pod still stops"
    world.exit_pods(exit_codes.ExitCode.PREEMPTED)
    world.settle()
    return world


def test_a_job_that_kueue_evicted_is_queued_and_neither_running_nor_stalled():
    world = evicted()
    for seconds in (0, 4000):
        world.advance(seconds)
        assert scheduled(world)[0] == "Queued"
        assert (world.status["phase"], world.condition("Training")["reason"]) == ("Queued", "NotRunning")
    assert world.reasons == [None], "it is the same attempt"


def test_time_in_the_queue_does_not_count_toward_the_active_deadline():
    world = evicted(activeDeadlineSeconds=1000)
    assert world.plan().requeue_after is None, "no clock runs"
    world.advance(10_000)
    world.settle()
    world.restart()  # its first pod is forgotten
    world.kueue_admits()
    world.advance(500)
    world.settle()
    assert (world.outcome, world.status["attempts"][0]["runSeconds"]) == ("Unknown", 100)
    world.start_pods()
    world.settle()
    assert world.condition("Scheduled")["status"] == "True"
    assert world.plan().requeue_after == 900
    world.advance(899)
    world.settle()
    assert world.outcome == "Unknown"
    world.advance(1)
    world.settle()
    assert world.condition("Succeeded")["reason"] == "DeadlineExceeded"
    assert world.status["attempts"][0]["runSeconds"] == 1000


def test_an_admitted_job_waits_for_its_pods_whatever_became_of_the_earlier_ones():
    world = evicted()
    world.kueue_admits()
    assert scheduled(world)[0] == "Pending"


def test_the_pending_deadline_is_not_for_a_job_that_was_evicted():
    world = evicted(pendingDeadlineSeconds=60)
    world.advance(4000)
    world.settle()
    assert world.outcome == "Unknown"


# Deadlines


def test_a_backoff_is_no_wait_for_pods():
    world = started(pendingDeadlineSeconds=30, recovery={"maxAttempts": 4, "backoffSeconds": 60})
    world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)
    world.settle()
    pause = world.plan().requeue_after
    assert pause is not None and pause > 50
    world.advance(pause - 1)
    world.settle()
    assert (world.outcome, world.condition("Scheduled")["reason"]) == ("Unknown", "BackingOff")
    world.advance(1)
    world.settle()
    assert world.reasons == ["Unavailable", None]
    assert world.plan().requeue_after == 30
    world.advance(30)
    world.settle()
    assert world.condition("Succeeded")["reason"] == "PendingDeadlineExceeded"


def test_the_active_deadline_wakes_the_operator_while_one_of_two_pods_waits():
    world = started(activeDeadlineSeconds=1000, resources={"nodes": 2})
    name = sorted(world.live_pods())[1]
    world.pods[name]["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": "ImagePullBackOff"}}
    world.changed("Pod", world.pods[name])
    world.advance(10)
    assert scheduled(world)[0] == "ImagePullBackOff"
    assert world.plan().requeue_after == 990


def test_the_active_deadline_stands_still_between_a_pod_and_its_replacement():
    world = started(activeDeadlineSeconds=1000)
    world.advance(10)
    world.exit_pods(exit_codes.ExitCode.PREEMPTED, disrupted="evicted by API")
    world.settle()
    assert world.plan().requeue_after is None
    world.advance(5000)
    world.start_pods()
    world.settle()
    assert world.plan().requeue_after == 990


@pytest.mark.parametrize(("deadline", "pause"), [("activeDeadlineSeconds", 10), ("pendingDeadlineSeconds", 0)])
def test_an_attempt_that_a_deadline_ends_is_closed_with_the_job(deadline: str, pause: int):
    world = World(**{deadline: 10})
    world.settle()
    if pause:
        world.start_pods()
        world.says(step=3, totalSteps=10)
    world.advance(10)
    world.settle()
    (attempt,) = world.status["attempts"]
    assert attempt["reason"] == world.condition("Succeeded")["reason"]
    assert attempt["finishedAt"] == world.status["completionTime"] == stamp(world.now)
    assert attempt.get("lastStep") == (3 if pause else None)
    assert attempt["runSeconds"] == pause
    assert world.events.count("AttemptEnded") == 1
    before = dict(world.status)
    world.exit_pods(exit_codes.ExitCode.PREEMPTED)
    world.settle()
    assert world.status == before


def test_a_running_job_whose_spec_can_no_longer_be_read_closes_its_attempt():
    world = started()
    world.change_spec(lora={"rank": -1})
    world.settle()
    assert world.reasons == ["ConfigInvalid"]
    assert not world.jobs
