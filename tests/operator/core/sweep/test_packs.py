"""Trials of a sweep that share a FineTuneJob, in a simulated cluster."""

from typing import Any

import pytest

from finetune_api import manifest
from finetune_operator.core.objects.observed import CreateBlocked
from support.simulation.sweep_world import SMALL_STEPS, SweepWorld
from support.simulation.world import is_empty

TRIALS = [{"name": name, "values": {"training.seed": number}} for number, name in enumerate("abcdef")]


def packed(**spec: Any) -> SweepWorld:
    world = SweepWorld(**{"trials": TRIALS, "template": SMALL_STEPS} | spec)
    world.settle()
    return world


def phases(world: SweepWorld) -> dict[str, str]:
    return {name: row["phase"] for name, row in world.rows.items()}


def test_trials_of_small_steps_share_one_job_that_is_a_valid_one() -> None:
    world = packed()
    assert world.created == ["nli-pack-0"] and world.status["packedFor"] == 4
    job = world.jobs["nli-pack-0"]
    found = manifest.check(manifest.Document({key: job[key] for key in ("kind", "metadata", "spec", "apiVersion")}, ""))
    assert found.spec.pack and [each.name for each in found.spec.pack.trials] == list("abcdef")
    assert job["spec"]["pack"]["atOnce"] == 4 and job["metadata"]["labels"] == {"finetune.dev/sweep": "nli"}
    row = {"name": "b", "values": "seed=1", "phase": "Pending", "jobName": "nli-pack-0"}
    assert world.rows["b"] == row and is_empty(world.plan())


def test_each_trial_is_told_as_it_stands_and_the_best_by_its_own_place() -> None:
    world = packed()
    world.trains("a", 10, 0.5)
    world.succeeds("b", evalLoss=0.3)
    world.fails("c")
    world.settle()
    assert phases(world) == dict.fromkeys("def", "Pending") | {"a": "Running", "b": "Succeeded", "c": "Failed"}
    best = {"trial": "b", "jobName": "nli-pack-0", "value": 0.3, "uri": "s3://adapters/nli/b/"}
    assert world.status["best"] == best and world.status["summary"] == "2/6" and world.rows["c"]["reason"] == "Diverged"
    for name in "adef":
        world.succeeds(name, evalLoss=0.4)
    world.settle()
    assert world.condition("Succeeded")["message"].startswith(
        "5 of 6 trials succeeded, 0 were stopped early and 1 failed"
    )
    assert world.created == ["nli-pack-0"]


def test_so_many_packs_run_that_parallelism_is_used() -> None:
    assert packed(parallelism=6).created == ["nli-pack-0", "nli-pack-1"]
    assert packed(parallelism=1).created == ["nli-a"]
    world = packed(template=SMALL_STEPS | {"training": {"batchSize": 8}})
    assert [world.jobs[name]["spec"]["pack"]["atOnce"] for name in world.created] == [2, 2]


def test_a_later_parallelism_changes_how_many_run_and_never_who_shares() -> None:
    world = packed(template=SMALL_STEPS | {"training": {"batchSize": 8}}, parallelism=2, packing="enabled")
    world.edit(parallelism=6)
    world.settle()
    assert world.created == ["nli-pack-0"]
    world = SweepWorld(trials=TRIALS, template=SMALL_STEPS | {"training": {"batchSize": 8}}, parallelism=4)
    world.reconcile()
    world.edit(parallelism=1)
    world.settle()
    assert world.created == ["nli-pack-0"]
    for name in "ace":
        world.succeeds(name, evalLoss=0.1)
    world.settle()
    assert world.created == ["nli-pack-0", "nli-pack-1"]


@pytest.mark.parametrize("packing", ["disabled", "auto"])
def test_others_each_have_their_own_job(packing: str) -> None:
    template = SMALL_STEPS if packing == "disabled" else SMALL_STEPS | {"training": {"batchSize": 16}}
    world = packed(packing=packing, template=template)
    assert world.created == [f"nli-{name}" for name in "abcd"] and "jobName" not in world.rows["a"]


def test_a_sweep_that_started_before_packing_goes_on_as_it_began() -> None:
    world = SweepWorld(trials=TRIALS, template=SMALL_STEPS)
    world.reconcile()
    del world.status["packedFor"]
    world.show(world.sweep)
    world.settle()
    assert world.created == [f"nli-{name}" for name in "abcd"]


def test_enabled_refuses_a_trial_that_can_share_with_no_other() -> None:
    world = packed(packing="enabled", trials=[*TRIALS, {"name": "g", "values": {"lora.dora": True}}])
    assert not world.created
    why = "spec.packing: enabled, but trial g: spec.lora.dora: only plain LoRA is packed: take auto"
    assert why in world.condition("Accepted")["message"]


def test_what_the_process_takes_along_goes_on_alone_and_what_it_decided_stays() -> None:
    world = packed()
    world.succeeds("a", evalLoss=0.3)
    world.fails("b")
    world.fails("c", "Outperformed", "Stopped")
    world.fails("d", "Error")
    world.trains("e", 10)
    world.settle()
    assert phases(world)["d"] == "Running", "its process may be started again"
    world.ends(world.jobs["nli-pack-0"], "OOMKilled")
    world.settle()
    assert world.created == ["nli-pack-0", "nli-d", "nli-e", "nli-f"]
    assert phases(world) == {"a": "Succeeded", "b": "Failed", "c": "Stopped"} | dict.fromkeys("def", "Pending")
    assert "jobName" not in world.rows["e"] and world.job("e")["spec"]["output"]["uri"] == "s3://adapters/nli/e/"
    world.delete_job("nli-e")
    world.settle()
    assert world.rows["e"]["reason"] == "Deleted" and len(world.created) == 4


@pytest.mark.parametrize("reason", ["NotPackable", "WontFit"])
def test_trials_that_cannot_share_the_model_or_not_its_gpu_each_get_a_job(reason: str) -> None:
    world = packed(parallelism=2)
    for name in "abcdef":
        world.fails(name, reason)
    world.settle()
    assert world.created == ["nli-pack-0", "nli-a", "nli-b"]


def test_a_pack_that_could_not_start_in_time_is_not_tried_again_one_by_one() -> None:
    world = packed()
    world.ends(world.jobs["nli-pack-0"], "PendingDeadlineExceeded")
    world.settle()
    assert set(phases(world).values()) == {"Failed"} and world.created == ["nli-pack-0"]
    assert world.condition("Succeeded")["reason"] == "NoTrialSucceeded"


def test_suspend_and_the_deadline_stop_the_pack_and_early_stopping_does_not() -> None:
    world = packed(activeDeadlineSeconds=600)
    world.fails("a", "Outperformed", "Stopped")
    world.settle()
    assert not world.jobs["nli-pack-0"]["spec"].get("suspend") and world.events == ["TrialStopped"]
    world.edit(suspend=True)
    world.settle()
    assert world.jobs["nli-pack-0"]["spec"]["suspend"] is True
    world.suspends("b")
    world.settle()
    assert phases(world)["b"] == "Suspended" and phases(world)["a"] == "Stopped"
    world.edit(suspend=False)
    world.settle()
    assert world.jobs["nli-pack-0"]["spec"]["suspend"] is False
    world.wait(600)
    world.settle()
    assert world.jobs["nli-pack-0"]["spec"]["suspend"] is True
    assert (phases(world)["b"], world.rows["b"]["reason"]) == ("Stopped", "DeadlineExceeded")


def test_a_pack_that_is_denied_is_told() -> None:
    world = SweepWorld(trials=TRIALS, template=SMALL_STEPS)
    world.reconcile()
    world.blocked = CreateBlocked("QuotaExceeded", "exceeded quota")
    world.settle()
    assert world.condition("Succeeded")["reason"] == "QuotaExceeded" and not world.created
