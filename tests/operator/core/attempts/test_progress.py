"""How far a job is, when it should be done, and whether it has stalled."""

from datetime import timedelta

import pytest

from finetune_api import exit_codes
from finetune_api.status import TrainerReport
from finetune_operator.core.plan import plan
from support.simulation.world import World, adapter_report, is_empty, stamp


def started(**spec: object) -> World:
    world = World(**spec)
    world.settle()
    world.start_pods()
    world.settle()
    return world


def in_an_hour(world: World) -> str:
    return stamp(world.now + timedelta(hours=1))


def next_attempt(world: World) -> None:
    world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)
    world.settle()
    world.advance(700)
    world.settle()
    world.start_pods()
    world.settle()


def training(world: World) -> str:
    return world.condition("Training")["reason"]


# Stalled


def test_a_resumed_attempt_that_catches_up_is_not_stalled():
    world = started()
    world.says(step=50, totalSteps=100)
    next_attempt(world)
    for step in range(1, 40):
        world.advance(60)
        world.says(step=step, totalSteps=100)
        assert (training(world), world.status["progress"]["step"]) == ("Training", 50)
    assert [attempt["lastStep"] for attempt in world.status["attempts"]] == [50, 39]


def test_another_stage_is_news_though_no_step_is_made():
    world = started()
    for stage in ("Starting", "CheckingData", "LoadingModel", "Evaluating", "Training"):
        world.says(stage)
        world.advance(world.settings.stalled_seconds - 1)
        world.settle()
        assert training(world) == stage


@pytest.mark.parametrize("step", [5, 50])
def test_a_trainer_that_repeats_itself_stalls_also_below_the_best_step(step: int):
    world = started()
    world.says(step=50, totalSteps=100)
    next_attempt(world)
    world.says(step=step, totalSteps=100)
    left = world.plan().requeue_after
    assert left == world.settings.stalled_seconds
    world.advance(left)
    world.settle()
    assert training(world) == "Stalled"


def test_stalling_outlives_the_operator():
    world = started()
    world.says(step=5, totalSteps=100)
    world.advance(world.settings.stalled_seconds)
    world.settle()
    assert training(world) == "Stalled"
    world.restart()
    world.says(step=5, totalSteps=100)
    assert training(world) == "Stalled", "the same words again are no news to a new operator"
    world.says(step=6, totalSteps=100)
    assert training(world) == "Training"
    assert world.events[-1] == "Recovered"


def test_a_pod_that_has_just_been_replaced_has_not_stalled():
    world = started()
    world.says(step=5, totalSteps=100)
    world.exit_pods(exit_codes.ExitCode.PREEMPTED, disrupted="evicted by API")
    world.advance(10 * world.settings.stalled_seconds)
    world.start_pods()
    world.settle()
    assert training(world) == "Starting"


# What to expect


def test_the_expected_end_and_the_pace_are_kept_only_while_the_trainer_goes_on():
    world = started()
    world.says(step=50, totalSteps=100, tokensPerSecond=9, estimatedCompletionTime=in_an_hour(world))
    assert world.status["progress"]["estimatedCompletionTime"] == in_an_hour(world)
    world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)
    world.settle()
    assert world.condition("Scheduled")["reason"] == "BackingOff"
    assert not {"estimatedCompletionTime", "tokensPerSecond"} & set(world.status["progress"])
    assert world.status["progress"]["summary"] == "50/100"


def test_while_it_catches_up_the_expected_end_is_the_new_attempts():
    world = started()
    world.says(step=50, totalSteps=100, tokensPerSecond=9, estimatedCompletionTime=in_an_hour(world))
    next_attempt(world)
    world.says(step=10, totalSteps=100, tokensPerSecond=8, estimatedCompletionTime=in_an_hour(world))
    progress = world.status["progress"]
    assert (progress["step"], progress["tokensPerSecond"]) == (50, 8)
    assert progress["estimatedCompletionTime"] == in_an_hour(world)


def test_a_stalled_trainer_is_not_expected_to_end():
    world = started()
    world.says(step=50, totalSteps=100, tokensPerSecond=9, estimatedCompletionTime=in_an_hour(world))
    world.advance(world.settings.stalled_seconds)
    world.settle()
    assert "estimatedCompletionTime" not in world.status["progress"]
    assert world.plan().status is None, "and that is said once"


def test_an_expected_end_that_has_passed_is_not_believed():
    world = started()
    world.says(step=50, totalSteps=100, estimatedCompletionTime=stamp(world.now - timedelta(seconds=1)))
    assert "estimatedCompletionTime" not in world.status["progress"]


@pytest.mark.parametrize("spec", [{"suspend": True}])
def test_a_suspended_job_expects_nothing(spec):
    world = started()
    world.says(step=50, totalSteps=100, tokensPerSecond=9, estimatedCompletionTime=in_an_hour(world))
    world.change_spec(**spec)
    world.settle()
    assert "estimatedCompletionTime" not in world.status["progress"]


# What is written


def test_the_same_report_is_written_once_however_often_it_is_looked_at():
    world = started()
    world.says(step=50, totalSteps=100, loss=0.5, estimatedCompletionTime=in_an_hour(world))
    for _ in range(10):
        world.advance(1)
        assert is_empty(world.plan())
    later = {"step": 50, "totalSteps": 100, "loss": 0.5, "tokensPerSecond": 8}
    world.report = TrainerReport.model_validate({"stage": "Training", "progress": later})
    assert is_empty(world.plan()), "another pace without another step is no news"


@pytest.mark.parametrize("stage", ["Failed", "Succeeded"])
def test_a_trainers_last_word_is_not_yet_the_jobs(stage: str):
    world = started()
    world.says("Training", step=5, totalSteps=10)
    world.says(stage, step=5, totalSteps=10)
    assert (world.status["phase"], world.outcome) == ("Finishing", "Unknown")
    assert world.status["attempts"][0]["stage"] == "Training", "what it did, not that it is over"


def test_between_the_pods_end_and_the_jobs_nothing_is_said_that_a_moment_later_is_wrong():
    world = started()
    world.says(step=5, totalSteps=10, tokensPerSecond=9)
    before = dict(world.status)
    (name,) = world.live_pods()
    world.end_pod(name, 3)
    world.settle()
    assert world.status == before


def test_when_the_leader_has_ended_the_others_are_about_to():
    world = started(resources={"nodes": 2})
    world.says(step=5, totalSteps=10)
    world.end_pod(sorted(world.live_pods())[0], 0)
    world.settle()
    assert (world.status["phase"], training(world)) == ("Finishing", "Finishing")


def test_the_report_of_another_pod_is_not_taken_for_this_attempts():
    world = started()
    world.says(step=50, totalSteps=100)
    (name,) = world.live_pods()
    world.end_pod(name, 3)
    world.settle()
    observed = world.observed()
    assert observed is not None
    stale = TrainerReport.model_validate({"stage": "Training", "progress": {"step": 99, "totalSteps": 100}})
    from dataclasses import replace

    made = plan(replace(observed, report=stale), world.settings, world.now)
    assert made.status is None, "no pod runs, so nobody can have said it"


@pytest.mark.parametrize("step", [40, 100])
def test_a_job_that_has_succeeded_is_done_in_however_few_steps(step: int):
    world = started()
    world.says(step=30, totalSteps=100)
    world.exit_pods(0, adapter_report(step))
    world.settle()
    progress = world.status["progress"]
    assert (progress["summary"], progress["percent"]) == (f"{step}/100", 100)


def test_a_job_that_has_failed_is_as_far_as_it_came():
    world = started()
    world.says(step=30, totalSteps=100)
    world.exit_pods(exit_codes.ExitCode.DIVERGED)
    world.settle()
    assert (world.outcome, world.status["progress"]["percent"]) == ("False", 30)
