"""Sweeps on a Kubernetes API: the operator's process, and simulated trainers."""

from typing import Any

import pytest

from finetune_api import constants
from support.node.node import ProcessNode
from support.operator.fixtures import Jobs, StartOperator, manifest
from support.operator.process import OperatorProcess
from support.server.client import Kube, Object, wait_until


def sweep(name: str, *stories: str, **spec: Any) -> Object:
    """A sweep whose trials t0, t1, ... tell these stories."""
    template = manifest(name)["spec"]
    trials = [
        {"name": f"t{number}", "values": {"dataset.train": f"s3://simulated/{story}", "training.seed": number}}
        for number, story in enumerate(stories)
    ]
    given = {"template": template, "trials": trials, "objective": {"metric": "trainLoss"}}
    return {
        "apiVersion": constants.API_VERSION,
        "kind": constants.SWEEP_KIND,
        "metadata": {"name": name},
        "spec": given | spec,
    }


def condition(kube: Kube, name: str, kind: str = "Succeeded") -> Object:
    found = (kube.get(constants.SWEEP_KIND, name).get("status") or {}).get("conditions", [])
    return next((c for c in found if c["type"] == kind), {})


def wait_over(kube: Kube, name: str) -> Object:
    def look() -> Object | None:
        found = condition(kube, name)
        return found if found.get("status") in ("True", "False") else None

    return wait_until(look, f"sweep {name} is over", 90)


def test_a_sweep_from_creation_to_deletion(own_operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs):
    kube.create(sweep("nli", "succeed", "fail-65", "succeed"))
    assert wait_over(kube, "nli")["status"] == "True"
    status = kube.get(constants.SWEEP_KIND, "nli")["status"]
    assert [(row["name"], row["phase"]) for row in status["trials"]] == [
        ("t0", "Succeeded"),
        ("t1", "Failed"),
        ("t2", "Succeeded"),
    ]
    assert status["trials"][1]["reason"] == "DatasetInvalid"
    assert status["summary"] == "3/3"
    assert status["best"] == {"trial": "t0", "jobName": "nli-t0", "value": 0.5, "uri": "s3://adapters/nli/t0/"}
    kube.delete(constants.SWEEP_KIND, "nli", propagationPolicy="Background")
    wait_until(lambda: not kube.list(constants.KIND), "its jobs are gone")


def test_refused_trials_and_a_wrong_path_are_told(start_operator: StartOperator, kube: Kube):
    start_operator(max_gpus_per_job=1)
    kube.create(sweep("wrong", trials=[{"name": "a", "values": {"lora.rnk": 4}}]))
    refusal = wait_over(kube, "wrong")
    assert (refusal["status"], refusal["reason"]) == ("False", "ConfigInvalid")
    assert "did you mean lora.rank?" in refusal["message"]
    assert not kube.list(constants.KIND)
    made = sweep("greedy", "succeed", "succeed")
    made["spec"]["trials"][0]["values"]["resources.gpusPerNode"] = 2
    made["spec"]["trials"][1]["values"]["resources.gpusPerNode"] = 4
    kube.create(made)
    assert wait_over(kube, "greedy")["reason"] == "NoTrialSucceeded"
    rows = kube.get(constants.SWEEP_KIND, "greedy")["status"]["trials"]
    assert [row["reason"] for row in rows] == ["PolicyRefused", "PolicyRefused"]


def test_a_killed_operator_neither_loses_nor_doubles_a_trial(
    start_operator: StartOperator, node: ProcessNode, kube: Kube
):
    first = start_operator()
    kube.create(sweep("nli", *["succeed"] * 6, parallelism=2))
    wait_until(lambda: kube.list(constants.KIND), "a trial is there")
    first.process.kill()
    start_operator()
    assert wait_over(kube, "nli")["status"] == "True"
    found = {job["metadata"]["name"]: job["status"] for job in kube.list(constants.KIND)}
    assert sorted(found) == [f"nli-t{number}" for number in range(6)]
    assert all(len(status["attempts"]) == 1 for status in found.values())


@pytest.mark.nightly
def test_what_was_drawn_for_a_trial_outlives_operators(start_operator: StartOperator, node: ProcessNode, kube: Kube):
    made, seen = sweep("nli", parallelism=2, strategy="tpe", maxTrials=6, seed=7), dict[str, Object]()
    made["spec"]["template"]["dataset"]["train"] = "s3://simulated/succeed"
    made["spec"] |= {"parameters": [{"path": "training.learningRate", "min": 1e-5, "max": 1e-2, "scale": "log"}]}
    del made["spec"]["trials"]
    kube.create(made)
    for number in range(1, 6):
        running = start_operator()
        wait_until(lambda number=number: len(kube.list(constants.KIND)) >= number, f"{number} trials are there")
        running.process.kill()
        found = {job["metadata"]["name"]: job["spec"]["training"] for job in kube.list(constants.KIND)}
        assert {name: found[name] for name in seen} == seen
        seen = found
    start_operator()
    assert wait_over(kube, "nli")["status"] == "True"
    jobs = {job["metadata"]["name"]: job for job in kube.list(constants.KIND)}
    assert sorted(jobs) == [f"nli-t{number}" for number in range(6)]
    rates = {job["spec"]["training"]["learningRate"] for job in jobs.values()}
    assert len(rates) == 6 and all(len(job["status"]["attempts"]) == 1 for job in jobs.values())
    for row in kube.get(constants.SWEEP_KIND, "nli")["status"]["trials"]:
        assert row["values"].startswith("learningRate=")


def packed(name: str, *ends: str, story: str = "succeed", **spec: Any) -> Object:
    """A sweep whose trials t0, t1, ... share a process that tells `story`, and end so."""
    found = sweep(name, packing="enabled", **spec)
    found["spec"]["template"] = manifest(name, story)["spec"] | {"training": {"batchSize": 4}}
    values = [{"lora.initFrom": f"s3://simulated/{end}"} if end else {} for end in ends]
    found["spec"]["trials"] = [{"name": f"t{number}", "values": each} for number, each in enumerate(values)]
    return found


def test_trials_that_share_a_job_each_come_to_their_own_end(
    own_operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
) -> None:
    kube.create(packed("nli", "", "fail-91", "behind", "", story="crash-3/succeed"))
    assert wait_over(kube, "nli")["status"] == "True"
    status = kube.get(constants.SWEEP_KIND, "nli")["status"]
    assert [(row["name"], row["phase"], row.get("reason")) for row in status["trials"]] == [
        ("t0", "Succeeded", None),
        ("t1", "Failed", "Diverged"),
        ("t2", "Stopped", "Outperformed"),
        ("t3", "Succeeded", None),
    ]
    assert {row["jobName"] for row in status["trials"]} == {"nli-pack-0"}
    best = {"trial": "t0", "jobName": "nli-pack-0", "value": 0.52, "uri": "s3://adapters/nli/t0/"}
    assert status["best"] == best and status["summary"] == "4/4"
    [job] = kube.list(constants.KIND)
    assert job["status"]["adapter"]["uri"] == "s3://adapters/nli/t0/"
    assert [row["phase"] for row in job["status"]["trials"]] == ["Succeeded", "Failed", "Stopped", "Succeeded"]


@pytest.mark.nightly
def test_what_a_broken_process_takes_along_goes_on_alone(
    own_operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
) -> None:
    kube.create(packed("nli", "", "", story="fail-78"))
    assert wait_over(kube, "nli")["reason"] == "NoTrialSucceeded"
    assert sorted(job["metadata"]["name"] for job in kube.list(constants.KIND)) == ["nli-pack-0", "nli-t0", "nli-t1"]


def test_suspended_and_resumed(own_operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs):
    kube.create(sweep("nli", "run/succeed", "run/succeed"))
    for name in ("nli-t0", "nli-t1"):
        wait_until(lambda name=name: kube.find(constants.KIND, name), f"{name} is there")
        jobs.wait(name, "Training", "True")
    kube.patch(constants.SWEEP_KIND, "nli", {"spec": {"suspend": True}})
    for name in ("nli-t0", "nli-t1"):
        jobs.wait(name, "Suspended", "True")
    kube.patch(constants.SWEEP_KIND, "nli", {"spec": {"suspend": False}})
    assert wait_over(kube, "nli")["status"] == "True"
