"""Jobs that say they are an attempt's: whoever may create Jobs can forge the owner reference, name, labels and all."""

import copy
import json
from typing import Any

import pytest

from finetune_api import constants, exit_codes
from finetune_operator.settings import Settings
from support.simulation.world import World, adapter_report, is_empty, stamp

Object = dict[str, Any]


def forge(world: World, name: str, **pod: Any) -> str:
    """Somebody makes the Job `name` for the FineTuneJob, as the operator would but for `pod`; its uid."""
    model = World()
    model.reconcile()
    obj = copy.deepcopy(model.jobs["nli-1"])
    assert world.job is not None
    obj["metadata"]["ownerReferences"][0]["uid"] = world.job["metadata"]["uid"]
    number = name.rpartition("-")[2]
    for metadata in (obj["metadata"], obj["spec"]["template"]["metadata"]):
        metadata["labels"][constants.LABEL_ATTEMPT] = number
    obj["spec"]["template"]["spec"]["containers"][0] |= pod
    obj["metadata"] |= {"name": name, "uid": world._uid(), "creationTimestamp": stamp(world.now)}
    world.jobs[name] = obj
    world.changed("Job", obj)
    return obj["metadata"]["uid"]


EVIL = {"image": "evil.example.com/x:1"}


def backing_off() -> World:
    world = World(recovery={"backoffSeconds": 30})
    world.settle()
    world.start_pods()
    world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)
    world.settle()
    assert world.condition("Scheduled")["reason"] == "BackingOff"
    return world


def suspended() -> World:
    world = World(suspend=True)
    world.settle()
    return world


@pytest.mark.parametrize(("make", "name"), [(backing_off, "nli-2"), (suspended, "nli-1")])
@pytest.mark.parametrize("has_ended", [False, True])
@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize(
    "pod", [EVIL, {"args": ["--set", "model.trustRemoteCode=true"]}, {"envFrom": [{"secretRef": {"name": "other"}}]}]
)
def test_a_forged_next_attempt_is_recorded_as_refused_and_the_one_after_it_runs(
    make: Any, name: str, has_ended: bool, is_restarted: bool, pod: Object
):
    world = make()
    uid = forge(world, name, **pod)
    if has_ended:
        world.make_pod(world.jobs[name])
        world.exit_pods(0, adapter_report())
    if is_restarted:
        world.restart()
    world.settle()
    assert (world.outcome, name in world.jobs) == ("Unknown", False)
    refused = world.status["attempts"][-1]
    assert (refused["reason"], refused["jobUid"], refused["runSeconds"]) == ("JobRefused", uid, 0)
    assert f"Job {name} names this job as its controller but is not what this operator builds" in refused["message"]
    world.change_spec(suspend=False)
    world.advance(100)
    world.settle()
    assert world.reasons[-1] is None
    following = f"nli-{int(name[-1]) + 1}"
    assert world.status["attempts"][-1]["jobUid"] == world.jobs[following]["metadata"]["uid"]
    world.start_pods()
    world.exit_pods(0, adapter_report())
    world.settle()
    assert world.outcome == "True"


@pytest.mark.parametrize("name", ["nli-2", "nli-7", "nli-999999999", "nli-0", "nli-x", "nli-eval-1", "other-1"])
def test_a_job_forged_beside_a_running_attempt_is_deleted_and_told_and_its_pods_count_for_nothing(name: str):
    world = World()
    world.settle()
    world.start_pods()
    world.says(step=1, totalSteps=100)
    uid = forge(world, name, **EVIL)
    world.make_pod(world.jobs[name])
    made = world.plan()
    assert [target.uid for target in made.delete] == [uid]
    assert f"Job {name} names this job as its controller" in json.dumps(made.status)
    asked = world.asked
    world.settle()
    world.hears(step=2, totalSteps=100)
    assert world.asked == asked, "the forged pod's report is not read"
    assert (list(world.jobs), world.reasons) == (["nli-1"], [None])
    world.exit_pods(0, adapter_report())
    world.settle()
    assert (world.outcome, world.reasons) == ("True", ["Succeeded"])


def test_a_job_forged_under_the_name_of_a_deleted_attempt_is_not_that_attempt():
    world = World(recovery={"backoffSeconds": 1})
    world.settle()
    world.start_pods()
    world.settle()
    world.delete_child("nli-1")
    forge(world, "nli-1", **EVIL)
    world.make_pod(world.jobs["nli-1"])
    world.exit_pods(0, adapter_report())
    world.advance(60)
    world.settle()
    world.advance(60)
    world.settle()
    assert (world.outcome, world.reasons) == ("Unknown", ["JobDeleted", None])
    assert list(world.jobs) == ["nli-2"]


def test_a_forged_job_after_the_end_is_stopped():
    world = World()
    world.settle()
    world.start_pods()
    world.exit_pods(0, adapter_report())
    world.settle()
    forge(world, "nli-2", **EVIL)
    world.settle()
    assert ("nli-2" in world.jobs, world.outcome, world.reasons) == (False, "True", ["Succeeded"])


def test_a_perfect_forgery_does_not_pass_the_rules():
    """It is exactly what would be built, for a spec that the rules refuse."""
    world = World(Settings(max_gpus_per_job=0), suspend=True)
    forge(world, "nli-1")
    world.settle()
    assert (world.condition("Accepted")["reason"], list(world.jobs)) == ("PolicyRefused", [])


@pytest.mark.parametrize("calls", [1, 2])
def test_what_the_operator_made_before_a_crash_is_taken(calls: int):
    world = World()
    world.reconcile(crash_after=calls)
    uid = world.jobs["nli-1"]["metadata"]["uid"]
    world.settle()
    assert [(each["jobName"], each["jobUid"]) for each in world.status["attempts"]] == [("nli-1", uid)]
    assert is_empty(world.plan())


def test_an_attempt_whose_owner_reference_is_removed_goes_on_and_says_so():
    world = World()
    world.settle()
    world.start_pods()
    world.says(step=1, totalSteps=100)
    del world.jobs["nli-1"]["metadata"]["ownerReferences"]
    world.changed("Job", world.jobs["nli-1"])
    world.settle()
    said = world.condition("Scheduled")
    assert (said["status"], world.reasons) == ("True", [None])
    assert "the owner reference to this job was removed from Job nli-1: put it back" in said["message"]
    world.change_spec(activeDeadlineSeconds=1)
    world.advance(60)
    world.settle()
    assert (world.outcome, list(world.jobs)) == ("False", [])


@pytest.mark.parametrize("is_owned", [True, False])
@pytest.mark.parametrize("is_restarted", [True, False])
def test_a_changed_parallelism_is_told_while_kubernetes_stops_the_pods_and_after(is_owned: bool, is_restarted: bool):
    world = World()
    world.settle()
    world.start_pods()
    world.says(step=1, totalSteps=100)
    job = world.jobs["nli-1"]
    if not is_owned:
        del job["metadata"]["ownerReferences"]
    job["spec"]["parallelism"] = 0
    world.changed("Job", job)
    world.stop_pods("nli-1")
    if is_restarted:
        world.restart()
    world.settle()
    assert world.condition("Scheduled")["reason"] == "ParallelismChanged", "although its pod still runs"
    (pod,) = world.live_pods()
    world.end_pod(pod, exit_codes.ExitCode.PREEMPTED)
    world.remove_pods()
    world.advance(60)
    world.settle()
    said = world.condition("Scheduled")
    assert said["message"].startswith("somebody else set parallelism of Job nli-1 to 0: set it back to 1")
    assert world.reasons == [None]


def test_attempts_of_which_crash_after_crash_left_nothing_recorded_are_all_taken():
    """The second may have published its adapter: it is not deleted as a Job that somebody else made."""
    world = World(recovery={"backoffSeconds": 0})
    world.reconcile(crash_after=1)
    world.start_pods()
    world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)
    world.reconcile(crash_after=1)
    made = [(name, world.jobs[name]["metadata"]["uid"]) for name in ("nli-1", "nli-2")]
    assert not world.status.get("attempts")
    world.start_pods()
    world.exit_pods(0, adapter_report())
    world.settle()
    assert (world.outcome, world.reasons) == ("True", ["Unavailable", "Succeeded"])
    assert [(each["jobName"], each["jobUid"]) for each in world.status["attempts"]] == made
