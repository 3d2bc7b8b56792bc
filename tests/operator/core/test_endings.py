"""How attempts end when streams lag and clocks differ, what is kept of them, and when the next one starts."""

from datetime import timedelta
from typing import Any

import pytest

from finetune_api import constants, exit_codes
from finetune_operator.core.plan import plan
from support.simulation.world import World, adapter_report


def started(**more: Any) -> World:
    world = World(**more)
    world.settle()
    world.start_pods()
    world.settle()
    return world


# Streams and clocks


@pytest.mark.parametrize("skew", [-30, -1, 0, 1, 30, 3600])
def test_a_success_is_believed_however_late_its_pod_is_shown_and_whatever_the_clock_says(skew: int):
    world = started(lag=True, skew=skew)
    world.exit_pods(0, adapter_report())
    for _ in range(40):
        world.advance(1)
        world.deliver("Job")
        world.reconcile()
    assert world.reasons == [None] or world.outcome == "True"
    world.settle()
    world.advance(60)
    world.settle()
    assert (world.outcome, world.reasons) == ("True", ["Succeeded"])


@pytest.mark.parametrize("skew", [-30, -1, 0, 1, 30, 3600])
def test_a_success_whose_pod_no_watch_ever_showed_is_found_by_looking(skew: int):
    world = World(lag=True, skew=skew)
    world.settle()
    world.start_pods()
    world.exit_pods(0, adapter_report())
    world.streams["Pod"].clear()
    for _ in range(45):
        world.advance(1)
        world.deliver("Job")
        world.reconcile()
    assert (world.outcome, world.reasons) == ("True", ["Succeeded"])


def test_before_a_look_nothing_is_concluded_and_after_it_the_loss_is():
    world = started()
    world.lose_pods()
    world.advance(60)
    observed = world.observed()
    assert observed is not None
    made = plan(observed, world.settings, world.now)
    assert made.look_up == ("nli-1",)
    assert "attempts" not in (made.status or {})
    world.settle()
    assert world.reasons[0] == "PodLost"


def test_a_job_that_vanished_is_not_replaced_while_a_pod_runs_that_no_watch_has_shown():
    world = World(lag=True)
    world.settle()
    world.start_pods()
    world.delete_child("nli-1")
    world.deliver("Job")
    world.advance(700)
    for _ in range(5):
        world.reconcile()
    assert not world.jobs, "its pod may still write"
    world.exit_pods(exit_codes.ExitCode.PREEMPTED)
    world.settle()
    world.advance(700)
    world.settle()
    assert (world.reasons, list(world.jobs)) == (["JobDeleted", None], ["nli-2"])


def test_a_suspended_job_is_not_said_to_be_at_rest_while_a_pod_runs_that_no_watch_has_shown():
    world = World(lag=True)
    world.settle()
    world.start_pods()
    world.change_spec(suspend=True)
    world.deliver(constants.KIND)
    for _ in range(3):
        world.reconcile()
    assert world.condition("Suspended")["reason"] == "Suspending"
    world.exit_pods(exit_codes.ExitCode.PREEMPTED)
    world.settle()
    assert world.reasons == ["Suspended"]


def test_of_two_ranks_the_one_that_is_not_shown_yet_may_be_the_one_to_blame():
    world = started(lag=True, resources={"nodes": 2})
    first, second = sorted(world.live_pods())
    world.end_pod(second, 65)
    world.advance(1)
    world.end_pod(first, 1)
    world.conclude("Failed")
    shown = [event for event in world.streams["Pod"] if event[1]["metadata"]["name"] == first]
    world.streams["Pod"].clear()
    for _, pod in shown:
        world.cache.put("Pod", pod)
    world.deliver("Job")
    for _ in range(10):
        world.reconcile()
        world.advance(1)
    assert world.reasons == ["DatasetInvalid"]


def test_a_job_that_is_shown_to_be_over_before_its_pod_is_costs_neither_a_status_nor_an_event():
    world = started(lag=True)
    world.says(step=5, totalSteps=10)
    before, told = dict(world.status), list(world.events)
    world.exit_pods(0, adapter_report())
    world.deliver("Job")
    world.reconcile()
    assert (world.status, world.events) == (before, told)
    assert world.plan().requeue_after == 1
    world.settle()
    assert world.outcome == "True"


# What is kept of an attempt


def test_an_attempt_that_reported_nothing_has_no_last_step_of_its_own():
    world = started()
    world.says(step=50, totalSteps=100)
    for code in (exit_codes.ExitCode.UNAVAILABLE, 3):
        world.exit_pods(code)
        world.settle()
        world.advance(700)
        world.settle()
        world.start_pods()
        world.settle()
    first, second, third = world.status["attempts"]
    assert (first["lastStep"], second.get("lastStep"), third.get("lastStep")) == (50, None, None)


def test_an_attempt_starts_when_its_pod_does_and_stays_so_when_that_is_replaced_and_forgotten():
    world = World()
    world.settle()
    world.advance(30)
    world.start_pods()
    world.settle()
    began = world.status["attempts"][0]["startedAt"]
    assert began.endswith("12:00:30Z")
    world.advance(100)
    world.exit_pods(exit_codes.ExitCode.PREEMPTED, disrupted="evicted by API")
    world.settle()
    world.restart()
    world.advance(100)
    world.start_pods()
    world.settle()
    world.advance(50)
    world.exit_pods(3)
    world.settle()
    (attempt,) = world.status["attempts"]
    assert (attempt["startedAt"], attempt["runSeconds"]) == (began, 150)


def test_an_attempt_that_an_older_version_recorded_counts_from_its_start_to_its_end():
    world = started(activeDeadlineSeconds=1000)
    world.advance(200)
    world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)
    world.settle()
    assert world.job is not None
    attempt = world.job["status"]["attempts"][0]
    for field in ("runSeconds", "ranUntil", "heardAt", "stage"):
        attempt.pop(field, None)
    world.changed(constants.KIND, world.job)
    world.advance(700)
    world.settle()
    world.start_pods()
    world.settle()
    assert world.plan().requeue_after == 800


# When the next attempt starts


def pauses(world: World, *steps: int | None) -> list[int]:
    """Seconds until the next attempt, after attempts that were preempted at these steps."""
    found = []
    for step in steps:
        if step is not None:
            world.says(step=step, totalSteps=1000)
        world.exit_pods(exit_codes.ExitCode.PREEMPTED)
        world.settle()
        found.append(round(world.plan().requeue_after or 0, -1))
        world.advance(700)
        world.settle()
        world.start_pods()
        world.settle()
    return found


def test_preemptions_that_gain_nothing_are_retried_with_growing_pauses():
    assert pauses(started(recovery={"backoffSeconds": 100}), None, None, None, None) == pytest.approx(
        [100, 200, 400, 600], rel=0.11
    )


def test_preemptions_after_which_training_had_come_further_are_retried_at_once():
    assert pauses(started(recovery={"backoffSeconds": 100}), 10, 20, 30, 30, 30, 40) == pytest.approx(
        [100, 100, 100, 100, 200, 100], rel=0.11
    )


def test_pausing_by_hand_makes_no_later_preemption_wait_longer():
    world = started(recovery={"backoffSeconds": 100})
    for _ in range(4):
        world.change_spec(suspend=True)
        world.settle()
        world.exit_pods(exit_codes.ExitCode.PREEMPTED)
        world.settle()
        world.change_spec(suspend=False)
        world.settle()
        world.start_pods()
        world.settle()
    assert pauses(world, None) == pytest.approx([100], rel=0.11)


# Events


def test_each_transition_is_told_once():
    world = World()
    world.settle()
    world.start_pods()
    world.settle()
    world.says("CheckingData")
    for step in (1, 2, 3):
        world.says("Training", step=step, totalSteps=9)
        world.says("Evaluating", step=step, totalSteps=9)
    world.advance(world.settings.stalled_seconds)
    world.settle()
    world.says("Training", step=4, totalSteps=9)
    world.change_spec(suspend=True)
    world.settle()
    world.exit_pods(exit_codes.ExitCode.PREEMPTED)
    world.settle()
    world.change_spec(suspend=False)
    world.settle()
    world.start_pods()
    world.settle()
    world.exit_pods(0, adapter_report())
    world.settle()
    assert world.events == [
        *("AttemptStarted", "Training", "Stalled", "Recovered", "Suspending"),
        *("AttemptEnded", "Suspended", "AttemptStarted", "Resumed", "Succeeded"),
    ]


@pytest.mark.parametrize(("seconds", "told"), [(0, 0), (59, 0), (60, 1)])
def test_that_pods_run_is_told_after_a_long_wait(seconds: int, told: int):
    world = World()
    world.settle()
    world.advance(seconds)
    world.start_pods()
    world.settle()
    assert world.events.count("PodsRunning") == told


def test_that_pods_run_is_told_after_a_wait_that_was_told():
    world = World(labels={constants.LABEL_KUEUE_QUEUE: "gpu"})
    world.settle()
    world.kueue_admits()
    world.start_pods()
    world.settle()
    assert world.events == ["AttemptStarted", "Queued", "PodsRunning"]


def test_a_deadline_while_suspended_is_not_told_as_a_resumption():
    world = started(activeDeadlineSeconds=100)
    world.advance(99)
    world.change_spec(suspend=True)
    world.settle()
    world.advance(1)
    world.settle()
    assert world.outcome == "False"
    assert "Resumed" not in world.events


def test_times_of_other_clocks_do_not_make_a_run_negative():
    world = started(activeDeadlineSeconds=1000, skew=-600)
    observed = world.observed()
    assert observed is not None
    made = plan(observed, world.settings, world.now - timedelta(seconds=600))
    assert made.requeue_after is not None and made.requeue_after <= 1000
