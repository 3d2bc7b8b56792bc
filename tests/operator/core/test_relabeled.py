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
