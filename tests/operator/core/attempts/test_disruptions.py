"""Evictions within an attempt, and where training went on after them, are told in status, events and metrics."""

from prometheus_client import CollectorRegistry

from finetune_api import constants, exit_codes
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.observability.job_metrics import JobMetrics
from support.simulation.world import World


def drained(world: World, why: str) -> None:
    world.exit_pods(exit_codes.ExitCode.PREEMPTED, disrupted=why)
    world.settle()
    world.advance(60)
    world.start_pods()
    world.settle()


def test_each_eviction_within_an_attempt_is_counted_once_and_told():
    world = World()
    world.settle()
    world.start_pods()
    world.settle()
    for number in (1, 2, 3):
        drained(world, f"Eviction API: evicting {number}")
        world.restart()
        world.settle()
    (attempt,) = world.status["attempts"]
    assert attempt["disruptions"] == 3
    assert "Eviction API: evicting 3" in attempt["disruption"]
    assert world.events.count("PodDisrupted") == 3


def test_a_disruption_that_ends_the_attempt_is_counted_too():
    world = World(resources={"nodes": 2})
    world.settle()
    world.start_pods()
    world.settle()
    world.exit_pods(137, disrupted="preempted by a higher priority")
    world.settle()
    assert (world.reasons[0], world.status["attempts"][0]["disruptions"]) == ("NodeLost", 1)


def resumed(world: World, step: int, **more: str) -> None:
    report = world.report
    assert report is not None
    world.report = type(report).model_validate(
        report.model_dump(by_alias=True, exclude_none=True) | {"resumedFrom": {"step": step, **more}}
    )
    world.settle()


def test_where_training_went_on_is_told_in_status_condition_and_event():
    world = World()
    world.settle()
    world.start_pods()
    world.settle()
    drained(world, "evicted by API")
    world.says(step=510, totalSteps=1000)
    resumed(world, 500)
    assert world.status["attempts"][0]["resumedFrom"] == {"step": 500}
    assert world.condition("Training")["message"] == "resumed from step 500"
    assert world.events.count("ResumedFromCheckpoint") == 1
    world.exit_pods(3)
    world.settle()
    assert world.status["attempts"][0]["resumedFrom"] == {"step": 500}


def test_a_checkpoint_of_an_earlier_job_is_said_to_be_one():
    world = World()
    world.settle()
    world.start_pods()
    world.settle()
    world.says(step=510, totalSteps=1000)
    resumed(world, 500, jobUid="0a1b")
    assert world.condition("Training")["message"] == "resumed from step 500 of an earlier FineTuneJob (uid 0a1b)"


def test_disruptions_are_a_metric():
    world = World()
    world.settle()
    world.start_pods()
    world.settle()
    registry = CollectorRegistry()
    metrics = JobMetrics(list, 10, lambda: world.now, registry)
    assert world.job is not None
    before = JobObject.from_api({"kind": constants.KIND, **world.job})
    drained(world, "evicted by API")
    metrics.record_status(before, JobObject.from_api({"kind": constants.KIND, **world.job}))
    assert registry.get_sample_value("finetune_operator_pod_disruptions_total", {"namespace": "team"}) == 1
