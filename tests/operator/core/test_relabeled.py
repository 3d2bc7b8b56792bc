"""Jobs and pods that lose our label are followed by name (a simulated cluster): nothing is made beside them."""

import pytest

from finetune_api import constants
from support.simulation.world import World, adapter_report

REMOVED = {constants.LABEL_JOB: None, constants.LABEL_ATTEMPT: None}
REPLACED = {constants.LABEL_JOB: "another", constants.LABEL_ATTEMPT: "7"}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("labels", [REMOVED, REPLACED])
@pytest.mark.parametrize("kinds", [("Job",), ("Pod",), ("Job", "Pod")])
def test_an_attempt_without_its_labels_goes_on_to_its_success(
    kinds: tuple[str, ...], labels: dict[str, str | None], restarted: bool
):
    world = World()
    world.settle()
    world.start_pods()
    world.settle()
    for kind in kinds:
        for name in list(world.jobs if kind == "Job" else world.pods):
            world.relabel(kind, name, labels)
    if restarted:
        world.restart()
    for _ in range(3):
        world.settle()
        world.advance(60)
    assert (list(world.jobs), world.reasons) == (["nli-1"], [None])
    world.exit_pods(0, adapter_report())
    world.settle()
    world.advance(60)
    world.settle()
    assert (world.outcome, world.reasons) == ("True", ["Succeeded"])


def test_why_a_job_was_deleted_is_kept_when_the_pod_that_it_let_go_ends_first():
    world = World()
    world.settle()
    world.start_pods()
    world.settle()
    (first,) = world.live_pods()
    world.release_pod(first, {constants.LABEL_JOB: "nli"})
    world.settle()
    world.end_pod(first, 75)
    world.settle()
    for name in world.live_pods():
        world.end_pod(name, 75)
    world.settle()
    assert world.reasons == ["JobDeleted"]
    assert f"pod {first} runs, but Job nli-1 controls it no more" in world.status["attempts"][0]["message"]


@pytest.mark.parametrize("is_labeled", [True, False])
def test_a_pod_that_its_job_let_go_never_writes_beside_another_for_long(is_labeled: bool):
    world = World()
    world.settle()
    world.start_pods()
    world.says(step=1, totalSteps=100)
    (first,) = world.live_pods()
    labels = {constants.LABEL_JOB: "nli", constants.LABEL_ATTEMPT: "1"} if is_labeled else {"app": "x"}
    world.release_pod(first, labels)
    assert len(world.live_pods()) == 2
    world.settle()
    assert (list(world.jobs), world.outcome) == ([], "Unknown")
    for name in world.live_pods():
        if name != first:
            world.end_pod(name, 75)
    for _ in range(3):
        world.settle()
        world.advance(700)
    assert (world.live_pods(), list(world.jobs), world.reasons) == ([first], [], ["JobDeleted"])
    assert f"pod {first} runs, but Job nli-1 controls it no more" in world.status["attempts"][0]["message"]
    assert f"waiting for pod {first} to end" in world.condition("Scheduled")["message"]
    world.end_pod(first, 75)
    world.settle()
    assert list(world.jobs) == ["nli-2"]
