"""Two jobs never write to one output at the same time: the later waits before it holds a GPU."""

import copy
from typing import Any

import pytest

from support.simulation.world import World, stamp

Object = dict[str, Any]


def rival(world: World, name: str = "other", uid: str = "u-other", older: bool = True, **changes: Any) -> Object:
    """Show the operator another job with the same output as the world's."""
    assert world.job is not None
    found = copy.deepcopy(world.job)
    created = stamp(world.now.replace(year=2001 if older else 2099))
    found["metadata"] |= {"name": name, "uid": uid, "creationTimestamp": created, "resourceVersion": "1"}
    found |= {"spec": found["spec"] | changes.pop("spec", {}), "status": changes.pop("status", {})}
    found["metadata"] |= changes
    world.cache.put("FineTuneJob", found)
    return found


def test_the_later_job_waits_without_a_gpu_and_starts_when_the_earlier_is_over():
    world = World()
    other = rival(world)
    assert world.reconcile().create == ()
    scheduled = world.condition("Scheduled")
    assert (scheduled["status"], scheduled["reason"]) == ("False", "OutputInUse")
    assert "job other writes, which is not over" in scheduled["message"]
    other["metadata"]["resourceVersion"] = "2"
    other["status"] = {"phase": "Succeeded"}
    world.cache.put("FineTuneJob", other)
    assert [obj["kind"] for obj in world.reconcile().create] == ["Job"]


def test_a_deleted_job_holds_nothing():
    world = World()
    other = rival(world)
    world.settle()
    world.cache.drop("FineTuneJob", other)
    assert [obj["kind"] for obj in world.reconcile().create] == ["Job"]


def test_another_output_lets_a_waiting_job_go():
    world = World()
    rival(world)
    world.settle()
    world.change_spec(output={"uri": "s3://adapters/{name}-2"})
    assert [obj["kind"] for obj in world.reconcile().create] == ["Job"]


@pytest.mark.parametrize(
    "changes",
    [
        {"older": False},
        {"namespace": "another"},
        {"spec": {"output": {"uri": "s3://adapters/elsewhere"}}},
        {"status": {"phase": "Failed"}},
        {"status": {"phase": "Suspended"}},
    ],
    ids=str,
)
def test_who_does_not_stand_in_the_way(changes: Object):
    world = World()
    rival(world, **changes)
    assert [obj["kind"] for obj in world.reconcile().create] == ["Job"]


@pytest.mark.parametrize("phase", ["Training", "Suspended", "Pending"])
def test_a_job_that_has_begun_goes_first_though_it_is_younger(phase: str):
    world = World()
    rival(world, older=False, status={"phase": phase, "attempts": [{"jobName": "other-1"}]})
    assert world.reconcile().create == ()
    assert world.condition("Scheduled")["reason"] == "OutputInUse"


def test_a_job_that_has_begun_is_never_held_up():
    world = World()
    world.settle()
    world.start_pods()
    rival(world)
    world.settle()
    assert world.condition("Scheduled")["reason"] == "PodsRunning"


def test_the_name_and_a_last_slash_make_no_difference():
    world = World(output={"uri": "s3://adapters/{name}"})
    rival(world, spec={"output": {"uri": "s3://adapters/nli/"}})
    assert world.reconcile().create == ()
    assert "s3://adapters/nli is where job other writes" in world.condition("Scheduled")["message"]


def test_of_many_waiting_jobs_one_goes_at_a_time():
    world = World()
    others = [rival(world, f"other-{n}", f"u-{n}") for n in range(5)]
    for other in others:
        world.reconcile()
        assert world.condition("Scheduled")["reason"] == "OutputInUse"
        world.cache.drop("FineTuneJob", other)
    assert [obj["kind"] for obj in world.reconcile().create] == ["Job"]
