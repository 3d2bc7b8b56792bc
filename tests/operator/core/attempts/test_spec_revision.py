"""A spec that changes between the making of attempt 1's Job and the first status: no attempt passes for the new spec
that ran the old one. Once an attempt is recorded, Kubernetes refuses such a change; of the image, once a pod has run.
"""

import json

import pytest

from finetune_api import constants, exit_codes
from finetune_operator.settings import Settings
from support.simulation.world import World, adapter_report, stamp

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


def test_its_success_counts_for_nothing_because_anybody_may_have_made_a_job_that_nobody_recorded():
    world = changed_in_between(training=OTHER)
    world.start_pods()
    world.exit_pods(0, adapter_report())
    world.settle()
    assert (world.outcome, world.reasons) == ("Unknown", ["SpecChanged", None])


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


TYPO, RIGHT = "registry.example.com/team/trainer:tpyo", "registry.example.com/team/trainer:1"
TEAMS = Settings(allowed_images=("registry.example.com/team/*",))


def stuck(**more: object) -> World:
    """Attempt 1 is recorded, and its pod waits for an image that cannot be pulled."""
    world = World(TEAMS, image=TYPO, **more)
    world.settle()
    fail_to_pull(world)
    return world


def fail_to_pull(world: World) -> None:
    for name in world.runnable():
        waiting = {"reason": "ImagePullBackOff", "message": "not found"}
        pod = world.pods[world.make_pod(world.jobs[name])]
        pod["status"] = {"phase": "Pending", "containerStatuses": [{"name": "trainer", "state": {"waiting": waiting}}]}
        world.changed("Pod", pod)
    world.settle()


def images(world: World) -> list[str]:
    return [job["spec"]["template"]["spec"]["containers"][0]["image"] for job in world.jobs.values()]


def mend(world: World, image: str | None) -> None:
    world.change_spec(image=image)
    world.settle()
    world.lose_pods()
    world.settle()


@pytest.mark.parametrize("image", [RIGHT, None], ids=["another", "the operator's"])
def test_an_image_that_cannot_be_pulled_is_mended_in_place(image: str | None):
    world = stuck()
    assert world.condition("Scheduled")["reason"] == "ImagePullBackOff"
    world.change_spec(image=image)
    world.settle()
    assert world.condition("Scheduled")["message"].endswith(
        "spec.image was changed before this attempt was known to run"
    )
    assert list(world.jobs) == []
    world.lose_pods()
    world.settle()
    assert (world.reasons, images(world)) == (["SpecChanged", None], [image or TEAMS.trainer_image])
    world.start_pods()
    world.exit_pods(0, adapter_report())
    world.settle()
    assert (world.outcome, world.reasons) == ("True", ["SpecChanged", "Succeeded"])


def test_it_may_take_several_corrections_and_none_is_counted():
    world = stuck(recovery={"maxAttempts": 1})
    for number in range(3):
        mend(world, f"{TYPO}{number}")
        fail_to_pull(world)
    mend(world, RIGHT)
    assert world.reasons == ["SpecChanged"] * 4 + [None]
    assert images(world) == [RIGHT]
    assert {attempt["runSeconds"] for attempt in world.status["attempts"][:-1]} == {0}, "the image may still change"


def test_the_rules_are_asked_for_the_new_image():
    world = stuck()
    mend(world, "registry.example.com/evil/trainer:1")
    assert (world.outcome, world.reasons, list(world.jobs)) == ("False", ["SpecChanged"], [])
    assert world.condition("Succeeded")["message"].endswith("(administrator's rule policy.allowedImages)")


def test_a_pod_that_began_meanwhile_saves_its_checkpoint_first():
    world = stuck()
    (pod,) = world.pods.values()
    container = {"name": "trainer", "state": {"running": {"startedAt": stamp(world.now)}}}
    pod["status"] = {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [container]}
    world.changed("Pod", pod)
    world.change_spec(image=RIGHT)
    world.settle()
    assert list(world.jobs) == [] and world.live_pods(), "never two writers"
    world.exit_pods(exit_codes.ExitCode.PREEMPTED)
    world.settle()
    assert (world.reasons, images(world)) == (["SpecChanged", None], [RIGHT])


def test_a_suspended_job_resumes_with_the_new_image():
    world = stuck()
    world.change_spec(suspend=True)
    world.settle()
    world.lose_pods()
    world.settle()
    world.change_spec(suspend=False, image=RIGHT)
    world.settle()
    assert (world.reasons, images(world)) == (["Suspended", None], [RIGHT])


def test_a_crash_at_any_call_makes_no_second_job():
    for calls in range(4):
        world = stuck()
        world.change_spec(image=RIGHT)
        world.deliver_all()
        world.reconcile(crash_after=calls)
        world.settle()
        world.lose_pods()
        world.settle()
        assert (world.reasons, images(world)) == (["SpecChanged", None], [RIGHT])


def test_an_upgrade_replaces_no_attempt_that_the_release_before_made():
    """Its Jobs note one hash, its statuses no uid of a Job, and its default image may be another."""
    world = World()
    world.reconcile()
    assert world.job is not None
    del world.job["status"]["attempts"][0]["jobUid"]
    world.changed(constants.KIND, world.job)
    annotations = world.jobs["nli-1"]["metadata"]["annotations"]
    annotations[constants.ANNOTATION_REVISION] = annotations[constants.ANNOTATION_REVISION].partition("-")[0]
    world.changed("Job", world.jobs["nli-1"])
    world.settings = Settings(trainer_image="finetune-trainer:next")
    world.restart()
    world.settle()
    assert (world.reasons, list(world.jobs)) == ([None], ["nli-1"])
    assert world.status["attempts"][0]["jobUid"] == world.jobs["nli-1"]["metadata"]["uid"]
