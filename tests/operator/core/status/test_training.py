"""The Training condition of a trainer that does not answer, and of one that this operator has not asked yet."""

import pytest

from finetune_api import exit_codes
from support.simulation.world import World, stamp


def training() -> World:
    world = World()
    world.settle()
    world.start_pods()
    world.says(step=5, totalSteps=100, tokensPerSecond=9)
    return world


def shown(world: World) -> tuple[str, str, str]:
    condition = world.condition("Training")
    return world.status["phase"], condition["status"], condition["reason"]


def test_a_trainer_that_no_longer_answers_is_not_said_to_train() -> None:
    world = training()
    world.advance(60)
    world.falls_silent()
    assert shown(world) == ("NotAnswering", "Unknown", "NotAnswering")
    assert f"has not answered since {stamp(world.now)};" in world.condition("Training")["message"]
    assert (world.outcome, world.condition("Succeeded")["reason"]) == ("Unknown", "NotAnswering")
    assert world.condition("Scheduled")["status"] == "True"
    progress = world.status["progress"]
    assert (progress["step"], "tokensPerSecond" in progress) == (5, False), "nobody knows its pace"
    assert world.events.count("NotAnswering") == 1


def test_it_trains_again_once_it_answers() -> None:
    world = training()
    world.falls_silent()
    world.advance(600)
    world.says(step=5, totalSteps=100)
    assert shown(world) == ("Training", "True", "Training")
    assert world.events[-1] == "Recovered"


def test_silence_that_lasts_is_a_stall() -> None:
    world = training()
    world.falls_silent()
    world.advance(world.settings.stalled_seconds)
    world.settle()
    assert shown(world) == ("Stalled", "False", "Stalled")


def test_a_trainer_that_has_not_answered_yet_still_starts() -> None:
    world = World()
    world.settle()
    world.start_pods()
    world.falls_silent()
    assert shown(world) == ("Starting", "False", "Starting")
    world.says(step=5, totalSteps=100)
    world.advance(60)
    world.exit_pods(exit_codes.ExitCode.PREEMPTED, disrupted="evicted by API")
    world.start_pods()
    world.falls_silent()
    assert shown(world)[0] == "Starting", "the pod that had answered was replaced"


@pytest.mark.parametrize("silent_before", [False, True])
def test_a_new_operator_shows_what_was_known_until_it_has_asked(silent_before: bool) -> None:
    world = training()
    if silent_before:
        world.falls_silent()
    before, events = world.status, list(world.events)
    world.advance(2 * world.settings.stalled_seconds)
    world.restart()
    world.settle()
    assert (world.status, world.events) == (before, events), "it knows of no stall: nobody has asked"
    world.falls_silent()
    assert shown(world)[0] == "Stalled"
    world.says(step=6, totalSteps=100)
    assert shown(world)[0] == "Training"


def test_a_dead_node_ends_the_silence_with_its_pod() -> None:
    world = training()
    world.falls_silent()
    world.exit_pods(137, disrupted="TaintManagerEviction: node is gone")
    world.settle()
    assert world.condition("Training")["reason"] == "NotRunning"
    world.advance(60)
    world.start_pods()
    world.settle()
    assert shown(world)[0] == "Starting"
