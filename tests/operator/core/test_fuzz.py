"""Fuzz: objects as an API server could return them, with parts missing, of another type, or from an older schema, never
crash the reconcile, never bring a finished job back to life, and never keep it from coming to rest.
"""

import copy
import json
import random
from typing import Any

import pytest

from finetune_api import names
from finetune_api.status import FineTuneJobStatus
from finetune_operator.core.plan import plan
from support.world import START, World, adapter_report, merged

MUTATIONS = 12_000
JUNK: tuple[Any, ...] = (
    *(None, "", "x" * 5000, -1, 0, 2**63, 1.5, True, [], {}, [None], ["a"], {"a": "b"}, [[]], {"type": 1}),
    *("2026-13-45T99:99:99Z", "True", "Unknown", [{"type": "Succeeded"}]),
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in children for found in paths(child, (*path, key)))]


def mutated(obj: dict[str, Any], noise: random.Random, keep: tuple[str, ...] = ()) -> dict[str, Any]:
    """A copy with one to four places changed, dropped or added. Places below `keep` stay."""
    result = copy.deepcopy(obj)
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
                target[last] = copy.deepcopy(noise.choice(JUNK))
    return result


#: What etcd itself guarantees.
IDENTITY = {("metadata", key) for key in ("name", "namespace", "uid", "resourceVersion")} | {("metadata",)}


def worlds() -> list[World]:
    """A job in each part of its life."""
    fresh, pending, running, suspended, over = (World() for _ in range(5))
    for world in (pending, running, suspended, over):
        world.settle()
    for world in (running, suspended, over):
        world.start_pods()
        world.settle()
    suspended.change_spec(suspend=True)
    suspended.settle()
    over.exit_pods(0, adapter_report())
    over.settle()
    return [fresh, pending, running, suspended, over]


@pytest.mark.parametrize("seed", range(4))
def test_mutated_objects_never_crash_or_wedge_the_reconcile(seed: int):
    noise = random.Random(seed)
    stages = worlds()
    for _ in range(MUTATIONS // 4):
        world = copy.deepcopy(noise.choice(stages))
        assert world.job is not None
        for kept in (world.jobs, world.pods):
            for name in kept:
                if noise.random() < 0.5:
                    kept[name] = mutated(kept[name], noise)
        if noise.random() < 0.8:
            world.job = mutated(world.job, noise)
        world.restart()
        observed = world.observed()
        assert observed is not None
        made = plan(observed, world.settings, START)
        assert made == plan(observed, world.settings, START)
        if made.status is not None:
            FineTuneJobStatus.model_validate(merged(world.job.get("status"), made.status))
        json.dumps([made.create, made.status])


@pytest.mark.parametrize("seed", range(2))
def test_a_finished_job_stays_finished_whatever_else_of_its_status_is_lost(seed: int):
    noise = random.Random(seed)
    over = worlds()[-1]
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
    world.changed(names.KIND, world.job)
    world.settle()
    assert world.condition("Accepted")["reason"] == "ConfigInvalid"
    assert world.condition("Accepted")["message"].startswith("spec")
