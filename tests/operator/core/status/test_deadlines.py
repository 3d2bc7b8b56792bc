"""What counts as run time: what ran, never an outage of the operator."""

import pytest

from finetune_api import constants, exit_codes
from support.simulation.world import World

HOURS = 36_000


def trained(seconds: int = 100, **spec: object) -> World:
    """A job that has trained so long, and last reported then."""
    world = World(activeDeadlineSeconds=3600, **spec)
    world.settle()
    world.start_pods()
    world.says(step=1, totalSteps=100)
    world.advance(seconds)
    world.says(step=2, totalSteps=100)
    return world


def back(world: World) -> World:
    """The operator is back after hours, and acts."""
    world.advance(HOURS)
    world.restart()
    world.settle()
    world.advance(10)
    world.settle()
    return world


def delete_job(world: World) -> None:
    world.delete_child("nli-1")
    world.exit_pods(0)


def lose_pods(world: World) -> None:
    world.lose_pods()


def exit_and_stay(world: World) -> None:
    world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)


def node_lost(world: World) -> None:
    world.exit_pods(137, disrupted="PodGC: node no longer exists")


def no_end_time(world: World) -> None:
    """As the kubelet reports containers that it has lost sight of."""
    world.exit_pods(137, reason="ContainerStatusUnknown")
    (pod,) = world.pods.values()
    del pod["status"]["containerStatuses"][0]["state"]["terminated"]["finishedAt"]
    world.changed("Pod", pod)


@pytest.mark.parametrize("what", [delete_job, lose_pods, exit_and_stay, node_lost, no_end_time])
def test_an_outage_of_the_operator_is_no_run_time(what) -> None:
    world = trained()
    what(world)
    back(world)
    assert (world.outcome, len(world.reasons)) == ("Unknown", 1 if what is node_lost else 2)
    assert world.status["attempts"][0].get("runSeconds") == (0 if what is node_lost else 100)
    world.start_pods()
    world.settle()
    assert world.plan().requeue_after is not None
    world.advance(3400)
    world.settle()
    assert world.outcome == "Unknown", "100 of 3600 s are used up"


def test_a_suspension_during_an_outage_is_no_run_time() -> None:
    world = trained()
    world.change_spec(suspend=True)
    delete_job(world)
    back(world)
    assert (world.outcome, world.status["attempts"][0]["runSeconds"]) == ("Unknown", 100)


def test_a_run_that_outlasts_an_outage_counts_in_full() -> None:
    world = trained()
    back(world)
    assert world.condition("Succeeded")["reason"] == "DeadlineExceeded"


def test_attempts_that_are_no_longer_listed_still_count_toward_the_deadline():
    world = World(activeDeadlineSeconds=1500, recovery={"backoffSeconds": 0})
    world.settle()
    for step in range(1, 20):
        world.start_pods()
        world.says(step=step, totalSteps=100)
        world.advance(100)
        world.settle()
        if world.outcome != "Unknown":
            break
        world.exit_pods(exit_codes.ExitCode.PREEMPTED)
        world.settle()
        world.advance(1)
        world.settle()
    assert (world.condition("Succeeded")["reason"], step) == ("DeadlineExceeded", 15)
    listed = len(world.status["attempts"])
    assert world.status["earlierAttempts"] == {"count": 15 - listed, "runSeconds": 100 * (15 - listed)}


def test_a_longer_status_that_is_stored_is_cut_and_its_run_time_kept():
    world = World()
    world.settle()
    assert world.job is not None
    (now,) = world.status["attempts"]
    long = [{"jobName": f"a{number}-0", "reason": "TrainerCrashed", "runSeconds": 2} for number in range(150)]
    long[-1]["message"] = "x" * 3000
    world.job["status"]["attempts"] = [*long, now]
    world.changed(constants.KIND, world.job)
    world.settle()
    attempts = world.status["attempts"]
    assert len(attempts) == 128
    assert world.status["earlierAttempts"] == {"count": 23, "runSeconds": 46}
    assert max(len(each.get("message", "")) for each in attempts) == 1024
