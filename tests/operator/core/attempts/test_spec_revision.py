"""A spec that changes between the making of attempt 1's Job and the first status: no attempt passes for the new spec
that ran the old one. Once an attempt is recorded, Kubernetes refuses such a change.
"""

import json

import pytest

from finetune_api import constants, exit_codes
from support.simulation.world import World, adapter_report

OTHER = {"maxLength": 1024}


def changed_in_between(**spec: object) -> World:
    """The Job is made; then the user changes the spec, before the status is written."""
    world = World()
    world.reconcile(crash_after=1)
    assert list(world.jobs) == ["nli-1"] and not world.status
    world.change_spec(**spec)
    return world


def asked_of(world: World, name: str) -> dict[str, object]:
    annotations = world.jobs[name]["spec"]["template"]["metadata"]["annotations"]
    return json.loads(annotations[constants.ANNOTATION_MANIFEST])["spec"]["training"]


def test_the_attempt_is_replaced_by_one_that_runs_the_new_spec():
    world = changed_in_between(training=OTHER)
    world.start_pods()
    world.settle()
    assert world.condition("Scheduled")["reason"] == "Stopping"
    assert list(world.jobs) == [], "its Job is deleted"
    world.settle()
    assert list(world.jobs) == [], "never two writers: its pod still lives"
    world.exit_pods(exit_codes.ExitCode.PREEMPTED)
    world.settle()
    assert world.reasons == ["SpecChanged", None]
    assert list(world.jobs) == ["nli-2"]
    assert asked_of(world, "nli-2")["maxLength"] == 1024
    assert world.status["observedGeneration"] == 2
    world.start_pods()
    world.exit_pods(0, adapter_report())
    world.settle()
    assert (world.outcome, world.reasons) == ("True", ["SpecChanged", "Succeeded"])


def test_a_crash_at_any_call_changes_nothing_of_that():
    for calls in range(4):
        world = changed_in_between(training=OTHER)
        world.start_pods()
        world.deliver_all()
        world.reconcile(crash_after=calls)
        world.settle()
        world.exit_pods(exit_codes.ExitCode.PREEMPTED)
        world.settle()
        assert world.reasons == ["SpecChanged", None]


@pytest.mark.parametrize("code", [exit_codes.ExitCode.DATASET_INVALID, exit_codes.ExitCode.GPU_OUT_OF_MEMORY])
def test_how_it_ended_while_nobody_looked_says_nothing_of_the_new_spec(code: int):
    world = changed_in_between(training=OTHER)
    world.start_pods()
    world.exit_pods(code)
    world.settle()
    assert world.reasons == ["SpecChanged", None]


def test_an_adapter_that_it_published_is_said_to_be_of_the_old_spec():
    world = changed_in_between(training=OTHER)
    world.start_pods()
    world.exit_pods(0, adapter_report())
    world.settle()
    assert world.outcome == "True"
    assert "but with an outdated spec" in world.condition("Succeeded")["message"]


def test_what_may_change_at_any_time_replaces_nothing():
    world = changed_in_between(activeDeadlineSeconds=3600)
    world.start_pods()
    world.settle()
    assert world.reasons == [None]
    assert list(world.jobs) == ["nli-1"]


def test_a_recorded_attempt_is_left_alone_whatever_another_version_reads_in_the_spec():
    world = World()
    world.settle()
    world.change_spec(training=OTHER)
    world.settle()
    assert list(world.jobs) == ["nli-1"]
    assert world.reasons == [None]
