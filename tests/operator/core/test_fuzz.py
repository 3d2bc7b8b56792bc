"""Fuzz: objects as an API server could return them, with parts missing, of another type, or from an older schema, and
trainers that say anything, never crash the reconcile, never make a status that the API server would refuse, never bring
a finished job back to life, and never keep one from coming to rest.
"""

import asyncio
import contextlib
import copy
import json
import math
import random
from typing import Any

import pytest

from finetune_api import constants, exit_codes
from finetune_api.plain_text import plain
from finetune_api.status import TrainerReport
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.plan import plan
from finetune_operator.kube.errors import ApiError
from finetune_operator.reconcile.reconciler import Conflict
from support.simulation.api import OneOperator, check_status
from support.simulation.copies import copied
from support.simulation.world import (
    START,
    World,
    adapter_report,
    merged,
)

KEY = ObjectKey(constants.KIND, "team", "nli")
MUTATIONS, WORDS, RECONCILES = 1_500, 500, 500
#: One seed holds the kind; seven more look further every night.
SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 8)))
JUNK: tuple[Any, ...] = (
    *(None, "", "x" * 5000, -1, 0, 2**63, 1.5, 1e300, True, [], {}, [None], ["a"], {"a": "b"}, [[]], {"type": 1}),
    *(
        "2026-13-45T99:99:99Z",
        "9999-12-31T23:59:59Z",
        "2026-11-01T12:00:00",
        "True",
        "Unknown",
        "no word",
        [{"type": "Succeeded"}],
        "\x1b]0;title\x07\x1b[2J\x9b1A\rAll is well\u202e",
    ),
)
#: What a trainer's JSON may hold besides.
NO_NUMBERS = (math.nan, math.inf, -math.inf, 2**70, "NaN", "\x00")
REPORT = {
    "stage": "Training",
    "progress": {"step": 7, "totalSteps": 10, "loss": 0.5, "percent": 70.0, "updatedAt": "2026-11-01T13:00:00Z"},
    "executionPlan": {"microBatchSize": 8, "measuredPeakMemoryBytes": 1},
    "metrics": {"trainLoss": 0.5},
}
#: What etcd itself guarantees.
IDENTITY = {("metadata", key) for key in ("name", "namespace", "uid", "resourceVersion")} | {("metadata",)}


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in children for found in paths(child, (*path, key)))]


def mutated(obj: dict[str, Any], noise: random.Random, junk: tuple[Any, ...] = JUNK) -> dict[str, Any]:
    """A copy with one to four places changed, dropped or added."""
    result = copied(obj)
    for _ in range(noise.randint(1, 4)):
        places = [p for p in paths(result) if p and p[0] not in ("apiVersion", "kind") and p[:2] not in IDENTITY]
        if not places:
            break
        *parents, last = noise.choice(places)
        target = result
        for key in parents:
            target = target[key]
        match noise.randint(0, 3):
            case 0 if isinstance(target, dict):
                del target[last]
            case 1 if isinstance(target, dict):
                target[f"{last}Old"] = target[last]
            case _:
                target[last] = copied(noise.choice(junk))
    return result


def worlds() -> dict[str, World]:
    """A job in each part of its life."""
    found = {name: World() for name in ("fresh", "pending", "waiting", "running", "suspended", "failed", "over")}
    found |= {"two": World(resources={"nodes": 2}), "queued": World(labels={constants.LABEL_KUEUE_QUEUE: "gpu"})}
    for name, world in found.items():
        if name != "fresh":
            world.settle()
    for name in ("running", "suspended", "failed", "over", "two", "queued"):
        found[name].kueue_admits()
        found[name].start_pods()
        found[name].says(step=5, totalSteps=10, loss=0.5)
    stuck = {"waiting": {"reason": "ImagePullBackOff", "message": "manifest unknown"}}
    waiting = found["waiting"]
    pod = waiting.pods[waiting.make_pod(waiting.jobs["nli-1"])]
    pod["status"] = {"phase": "Pending", "containerStatuses": [{"name": "trainer", "state": stuck}]}
    found["queued"].kueue_evicts()
    found["suspended"].change_spec(suspend=True)
    found["failed"].exit_pods(exit_codes.ExitCode.UNAVAILABLE, {"stage": "Failed", "reason": "Unavailable"})
    found["over"].exit_pods(0, adapter_report())
    for name in ("queued", "suspended", "over"):
        found[name].settle()
    return found


def disturbed(world: World, noise: random.Random) -> World:
    """A copy whose objects are mutated."""
    world = copy.deepcopy(world)
    assert world.job is not None
    for kept in (world.jobs, world.pods):
        for name in kept:
            if noise.random() < 0.5:
                kept[name] = mutated(kept[name], noise)
    if noise.random() < 0.8:
        world.job = mutated(world.job, noise)
    return world


def said(body: dict[str, Any], noise: random.Random) -> str:
    """A trainer's JSON as it may come: mutated, cut off, or with more behind it."""
    if noise.random() < 0.8:
        body = mutated(body, noise, NO_NUMBERS + JUNK)
    text = json.dumps(body)
    return noise.choice([text, text, text, text[: noise.randint(0, len(text))], f"{text}}}", f"[{text}]"])


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_objects_never_crash_or_wedge_the_plan(seed: int):
    noise = random.Random(seed)
    stages = list(worlds().values())
    for _ in range(MUTATIONS):
        world = disturbed(noise.choice(stages), noise)
        world.restart()
        observed = world.observed()
        assert observed is not None and world.job is not None
        made = plan(observed, world.settings, START)
        assert made == plan(observed, world.settings, START)
        if made.status is not None:
            check_status(merged(world.job.get("status"), made.status))
        json.dumps([made.create, made.status])
        assert all(plain(event.message) == event.message for event in made.events)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_a_trainer_says_the_status_stays_writable(seed: int):
    noise = random.Random(seed)
    running = worlds()["running"]
    for _ in range(WORDS):
        world = copy.deepcopy(running)
        with contextlib.suppress(ValueError):
            world.report = TrainerReport.model_validate_json(said(REPORT, noise))
        made = world.plan()
        check_status(merged(world.status, made.status or {}))
        last = adapter_report() | {"executionPlan": {"microBatchSize": 8}, "metrics": {"evalLoss": 0.5}}
        world.exit_pods(noise.choice([0, 1, 65, 75, 90]), message=said(last, noise))
        world.settle()
        check_status(world.status)
        assert world.reasons[0] is not None


@pytest.mark.parametrize("seed", SEEDS)
def test_reconciles_of_mutated_objects_raise_api_errors_alone_and_come_to_rest_once_all_is_repaired(seed: int):
    noise = random.Random(seed)
    stages = list(worlds().values())

    async def story() -> None:
        whole = noise.choice(stages)
        faults = noise.choice([0.0, 0.0, 0.3])
        body = said(REPORT, noise).encode()
        operator = OneOperator(disturbed(whole, noise), lambda: noise.random() < faults, body)
        for _ in range(3):
            with contextlib.suppress(ApiError, Conflict):
                await operator.reconcile(KEY)
            operator.catch_up()
        faults = 0.0
        operator.show(whole)
        for _ in range(12):
            before = operator.api.writes
            await operator.reconcile(KEY)
            operator.catch_up()
            if operator.api.writes == before:
                return
        raise AssertionError("it never comes to rest")

    async def stories() -> None:
        for _ in range(RECONCILES):
            await story()

    asyncio.run(stories())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_finished_job_stays_finished_whatever_else_of_its_status_is_lost(seed: int):
    noise = random.Random(seed)
    over = worlds()["over"]
    for _ in range(500):
        world = copy.deepcopy(over)
        assert world.job is not None
        status = world.job["status"]
        summary = next(c for c in status["conditions"] if c["type"] == "Succeeded")
        world.job["status"] = mutated({"status": status}, noise).get("status")
        if not isinstance(world.job["status"], dict):
            continue
        world.job["status"]["conditions"] = [{key: summary[key] for key in ("type", "status")}]
        world.restart()
        made = world.plan()
        assert made.create == ()
        assert made.status is None


@pytest.mark.parametrize("spec", [None, [], "x", {}, {"model": None}, {"model": {"source": "hf://a/b"}}])
def test_a_spec_of_another_schema_is_refused_with_a_sentence(spec: Any):
    world = World()
    assert world.job is not None
    world.job["spec"] = spec
    world.changed(constants.KIND, world.job)
    world.settle()
    assert world.condition("Accepted")["reason"] == "ConfigInvalid"
    assert world.condition("Accepted")["message"].startswith("spec")
