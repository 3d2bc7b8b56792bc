"""What a sweep does with its trials, in a simulated cluster."""

import json

import pytest

from finetune_api import constants
from finetune_operator.core.objects.observed import CreateBlocked
from support.simulation.sweep_world import SweepWorld
from support.simulation.world import is_empty

RATES = [{"path": "training.learningRate", "values": [1e-4, 2e-4, 3e-4, 4e-4]}]
NAMES = ["lr1e-4", "lr2e-4", "lr3e-4", "lr4e-4"]


def test_the_first_write_freezes_the_sweep_and_creates_nothing():
    world = SweepWorld(parameters=RATES)
    made = world.reconcile()
    assert not made.create and made.requeue_after == 0
    assert world.status["startTime"] and world.status["summary"] == "0/4"
    assert world.condition("Accepted")["status"] == "True"


def test_each_trial_is_a_job_of_the_sweep_with_its_own_values_and_place():
    world = SweepWorld({"kueue.x-k8s.io/queue-name": "gpu", "team": "nlp"}, parameters=RATES)
    world.settle()
    assert sorted(world.jobs) == [f"nli-{name}" for name in NAMES]
    job = world.job("lr2e-4")
    assert job["spec"]["training"]["learningRate"] == 2e-4
    assert job["spec"]["output"]["uri"] == "s3://adapters/nli/lr2e-4/"
    labels = {"finetune.dev/sweep": "nli", "finetune.dev/trial": "lr2e-4", "kueue.x-k8s.io/queue-name": "gpu"}
    assert job["metadata"]["labels"] == labels
    [owner] = job["metadata"]["ownerReferences"]
    assert owner["uid"] == "sweep-uid" and owner["controller"] is True
    assert world.rows["lr2e-4"] == {"name": "lr2e-4", "values": "learningRate=2e-4", "phase": "Pending"}


def test_many_trials_are_created_in_parts_and_all_but_the_last_say_that_more_follow():
    rates = [{"path": "training.learningRate", "values": [number * 1e-6 for number in range(1, 251)]}]
    world = SweepWorld(parameters=rates, parallelism=250)
    parts = []
    while not world.jobs or parts[-1][1]:
        made = world.reconcile()
        parts += [(len(made.create), made.creates_more)] if made.create else []
    assert parts == [(100, True), (100, True), (50, False)]


def test_no_more_run_than_parallelism_allows_and_the_next_follows_an_end():
    world = SweepWorld(parameters=RATES, parallelism=2)
    world.settle()
    assert len(world.jobs) == 2
    world.trains("lr1e-4")
    world.settle()
    assert len(world.jobs) == 2
    world.succeeds("lr1e-4", evalLoss=0.3)
    world.settle()
    assert sorted(world.jobs) == ["nli-lr1e-4", "nli-lr2e-4", "nli-lr3e-4"]
    world.edit(parallelism=3)
    world.settle()
    assert len(world.jobs) == 4


def test_a_failed_trial_takes_no_other_along_and_the_best_is_told():
    world = SweepWorld(parameters=RATES)
    world.settle()
    world.fails("lr1e-4")
    world.succeeds("lr2e-4", evalLoss=0.31)
    world.settle()
    assert world.status["best"]["trial"] == "lr2e-4" and world.status["summary"] == "2/4"
    assert world.condition("Succeeded")["status"] == "Unknown"
    world.succeeds("lr3e-4", evalLoss=0.27)
    world.succeeds("lr4e-4", evalLoss=0.29)
    world.settle()
    best = {"trial": "lr3e-4", "jobName": "nli-lr3e-4", "value": 0.27, "uri": "s3://adapters/nli/lr3e-4/"}
    assert world.status["best"] == best
    assert world.rows["lr1e-4"]["reason"] == "Diverged"
    assert world.condition("Succeeded") | {"lastTransitionTime": ""} == {
        "type": "Succeeded",
        "status": "True",
        "reason": "Succeeded",
        "message": "3 of 4 trials succeeded, 0 were stopped early and 1 failed (Diverged: lr1e-4);"
        " best: lr3e-4 with evalLoss 0.27",
        "observedGeneration": 1,
        "lastTransitionTime": "",
    }
    assert world.events == ["Succeeded"]
    assert is_empty(world.plan())


def test_accuracy_is_maximized():
    template = SweepWorld().sweep["spec"]["template"] | {"evaluation": {"metrics": ["loss", "nli"]}}
    world = SweepWorld(parameters=RATES, template=template, objective={"metric": "accuracy"})
    world.settle()
    for number, name in enumerate(NAMES):
        world.succeeds(name, accuracy=0.5 + number / 10, evalLoss=1.0)
    world.settle()
    assert world.status["best"]["trial"] == "lr4e-4"


def test_a_sweep_without_a_single_success_failed():
    world = SweepWorld(parameters=RATES)
    world.settle()
    for name in NAMES:
        world.fails(name)
    world.settle()
    assert world.condition("Succeeded")["reason"] == "NoTrialSucceeded"
    assert world.status["phase"] == "Failed" and world.status["completionTime"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"parameters": [{"path": "learningRate", "values": [1]}]}, "did you mean training.learningRate?"),
        ({"parameters": [{"path": "lora.rank", "values": [8, 0]}]}, "trial r0: spec.lora.rank: Invalid value: 0"),
        ({"parameters": [{"path": "output.uri", "values": ["s3://a/b"]}]}, "output.uri cannot vary"),
        ({"trials": [{"name": "a", "values": {}}], "strategy": "best"}, 'supported values: "grid", "random", "tpe"'),
    ],
)
def test_a_sweep_with_a_wrong_trial_is_rejected_before_anything_runs(spec: dict, says: str):
    world = SweepWorld(**spec)
    world.settle()
    assert world.jobs == {}
    assert world.condition("Accepted")["status"] == "False" and says in world.condition("Accepted")["message"]
    assert world.condition("Succeeded")["reason"] == "ConfigInvalid"


def test_suspend_stops_all_trials_and_resume_starts_them_again():
    world = SweepWorld(parameters=RATES, parallelism=2)
    world.settle()
    world.edit(suspend=True)
    world.settle()
    assert all(job["spec"]["suspend"] for job in world.jobs.values()) and len(world.jobs) == 2
    assert world.condition("Suspended")["status"] == "True" and world.status["phase"] == "Suspended"
    world.edit(suspend=False)
    world.settle()
    assert not any(job["spec"]["suspend"] for job in world.jobs.values())
    assert world.condition("Suspended")["status"] == "False"


def test_a_trial_that_the_user_suspended_stays_so_while_its_sweep_runs():
    world = SweepWorld(parameters=RATES)
    world.settle()
    world._set_suspend("nli-lr1e-4", world.job("lr1e-4")["metadata"]["uid"], True)
    world.suspends("lr1e-4")
    world.settle()
    assert world.job("lr1e-4")["spec"]["suspend"] is True
    assert world.rows["lr1e-4"]["phase"] == "Suspended"


def test_a_deleted_trial_is_not_created_again():
    world = SweepWorld(parameters=RATES)
    world.settle()
    world.succeeds("lr1e-4", evalLoss=0.3)
    world.settle()
    world.delete_job("nli-lr1e-4")
    world.delete_job("nli-lr2e-4")
    world.settle()
    assert world.rows["lr1e-4"]["phase"] == "Succeeded" and world.status["best"]["uri"]
    assert world.rows["lr2e-4"]["reason"] == "Deleted"
    assert len(world.created) == 4


def test_the_deadline_stops_what_runs_and_keeps_the_best():
    world = SweepWorld(parameters=RATES, parallelism=2, activeDeadlineSeconds=600)
    world.settle()
    world.succeeds("lr1e-4", evalLoss=0.3)
    world.settle()
    world.wait(600)
    world.settle()
    assert world.condition("Succeeded")["reason"] == "DeadlineExceeded"
    assert world.status["best"]["trial"] == "lr1e-4"
    assert world.job("lr2e-4")["spec"]["suspend"] is True and "nli-lr4e-4" not in world.jobs
    assert world.rows["lr2e-4"]["reason"] == "DeadlineExceeded"


def test_the_sweep_is_deleted_after_its_ttl():
    world = SweepWorld(trials=[{"name": "only", "values": {}}], ttlSecondsAfterFinished=60)
    world.settle()
    world.succeeds("only", evalLoss=0.3)
    world.settle()
    assert world.plan().requeue_after == 60
    world.wait(60)
    [target] = world.plan().delete
    assert (target.kind, target.uid) == (constants.SWEEP_KIND, "sweep-uid")


def test_what_keeps_trials_from_being_created_is_told_and_nothing_else_happens():
    world = SweepWorld(parameters=RATES)
    world.reconcile()
    world.blocked = CreateBlocked("QuotaExceeded", "exceeded quota: jobs, used: 3, limited: 3")
    world.settle()
    assert world.condition("Succeeded")["reason"] == "QuotaExceeded"
    assert world.events == ["QuotaExceeded"]
    world.blocked = None
    world.settle()
    assert len(world.jobs) == 4


def test_jobs_of_an_earlier_sweep_of_the_name_are_not_its_trials():
    world = SweepWorld(parameters=RATES)
    stranger = {
        "kind": constants.KIND,
        "metadata": {
            "namespace": "team",
            "name": "nli-lr1e-4",
            "uid": "old",
            "labels": {"finetune.dev/sweep": "nli"},
            "ownerReferences": [{"kind": "FineTuneSweep", "name": "nli", "uid": "earlier", "controller": True}],
        },
        "spec": {},
    }
    world.show(stranger)
    made = [world.reconcile(), world.plan()][1]
    assert [obj["metadata"]["name"] for obj in made.create] == [f"nli-{name}" for name in NAMES]


def test_a_thousand_trials_fit_into_the_status():
    values = [round(1e-6 * number, 6) for number in range(1, 1001)]
    world = SweepWorld(parameters=[{"path": "training.learningRate", "values": values}], parallelism=1000)
    world.settle()
    assert len(world.jobs) == 1000 and len(world.rows) == 1000
    assert len(json.dumps(world.status)) < 400_000
    assert world.status_writes <= 12
