"""What an administrator sets, each setting tried with an operator of its own on a Kubernetes API."""

import os
import signal
import time

from prometheus_client.parser import text_string_to_metric_families

from support.node.node import ProcessNode
from support.operator.fixtures import Jobs, StartOperator
from support.server.client import Kube, wait_until
from support.server.kueue import WORKLOADS
from support.server.server import Cluster


def test_a_trainer_that_stands_still_is_flagged(
    start_operator: StartOperator, node: ProcessNode, kube: Kube, jobs: Jobs
):
    start_operator(stalled_seconds=2)
    jobs.create("nli", "hang")
    jobs.wait("nli", "Training", "False", "Stalled")
    wait_until(lambda: [e for e in jobs.events("nli") if e["reason"] == "Stalled"], "an event")


def test_a_trainer_that_no_longer_answers_is_said_to_be_silent_until_it_does(
    start_operator: StartOperator, node: ProcessNode, jobs: Jobs
):
    operator = start_operator(progress_interval_seconds=0.1, progress_timeout_seconds=0.1)
    jobs.create("nli", "run")
    jobs.wait("nli", "Training", "True")
    wait_until(lambda: (a := jobs.status("nli")["attempts"][0])["heardAt"] > a["startedAt"], "it is heard again")
    for pid in node.pids():
        os.kill(pid, signal.SIGSTOP)
    silent = jobs.wait("nli", "Training", "Unknown", "NotAnswering")
    assert "has not answered since" in silent["message"]
    assert jobs.status("nli")["phase"] == "NotAnswering"
    assert operator.metric("finetune_operator_jobs", phase="NotAnswering") == 1
    for pid in node.pids():
        os.kill(pid, signal.SIGCONT)
    jobs.wait("nli", "Training", "True")


def test_a_job_that_no_scrape_saw_leaves_its_final_values_until_it_is_deleted(
    start_operator: StartOperator, node: ProcessNode, kube: Kube, jobs: Jobs
):
    operator = start_operator(progress_interval_seconds=60)
    jobs.create("nli", "succeed")
    jobs.wait_over("nli")

    def values() -> dict[str, float | None]:
        names = ("step", "steps", "progress_ratio", "tokens_per_second")
        return {name: operator.metric(f"finetune_operator_job_{name}", name="nli") for name in names}

    assert values() == {"step": 20, "steps": 20, "progress_ratio": 1, "tokens_per_second": None}
    kube.delete("FineTuneJob", "nli")
    wait_until(lambda: not any(values().values()), "they go with the job")


def test_progress_is_written_no_more_often_than_the_setting_says(
    start_operator: StartOperator, node: ProcessNode, kube: Kube, jobs: Jobs
):
    operator = start_operator(progress_interval_seconds=2)
    jobs.create("nli", "run")
    jobs.wait("nli", "Training", "True")

    def patches() -> float:
        return operator.metric("finetune_operator_api_requests_total", verb="patch") or 0

    before, began = patches(), time.monotonic()
    wait_until(lambda: patches() >= before + 3, "three more writes", 60)
    assert time.monotonic() - began > 3.5, "three writes span at least two intervals"


def test_gauges_of_single_jobs_are_bounded(start_operator: StartOperator, node: ProcessNode, jobs: Jobs):
    operator = start_operator(job_metrics_limit=1)
    for name in ("one", "two"):
        jobs.create(name, "run")
    for name in ("one", "two"):
        jobs.wait(name, "Training", "True")
    found = [
        (family.name, sample.labels["name"])
        for family in text_string_to_metric_families(operator.get("/metrics").text)
        for sample in family.samples
        if "name" in sample.labels
    ]
    families = {family for family, _ in found}
    assert {"finetune_operator_job_step", "finetune_operator_job_attempts"} <= families
    assert len(found) == len(families), "one job each"


def test_an_administrators_rule_refuses_by_its_name(start_operator: StartOperator, jobs: Jobs):
    start_operator(allowed_images=["ghcr.io/team/*"], max_gpus_per_job=2, allowed_s3_buckets=["simulated", "adapters"])
    bad = {
        "policy.allowedImages": {"image": "docker.io/evil:1"},
        "policy.maxGpusPerJob": {"resources": {"gpusPerNode": 4}, "training": {"batchSize": 16}},
        "policy.allowedS3Buckets": {"output": {"uri": "s3://others/nli"}},
        "policy.allowRemoteCode": {
            "model": {"source": "hf://example/model", "revision": "a" * 40, "trustRemoteCode": True}
        },
        "file output": {"output": {"uri": "file:///adapters/nli"}},
        "protected paths": {"dataset": {"train": "file:///var/run/secrets/finetune/output"}},
    }
    for number, spec in enumerate(bad.values()):
        jobs.create(f"nli-{number}", **{"image": "ghcr.io/team/trainer:1", **spec})
    for number, rule in enumerate(bad):
        over = jobs.wait_over(f"nli-{number}")
        assert (over["status"], over["reason"]) == ("False", "PolicyRefused")
        assert f"rule {rule}" in over["message"]
        assert jobs.children(f"nli-{number}") == []


def test_defaults_of_the_administrator_reach_the_pods(start_operator: StartOperator, jobs: Jobs):
    toleration = {"key": "gpu", "operator": "Exists"}
    endpoints = ["https://s3.example.com", "https://*.internal"]
    limits = {"default_memory": "32Gi", "host_users": False}
    start_operator(node_selector={"pool": "gpu"}, tolerations=[toleration], allowed_s3_endpoints=endpoints, **limits)
    own = {"key": "spot", "operator": "Exists"}
    jobs.create("nli", resources={"gpusPerNode": 0, "nodeSelector": {"zone": "b"}, "tolerations": [own]})
    pod = wait_until(lambda: jobs.children("nli"), "its Job")[0]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "gpu", "zone": "b"}
    assert pod["tolerations"] == [own, toleration]
    assert pod["hostUsers"] is False
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "32Gi"}
    env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert env["FINETUNE_ALLOWED_S3_ENDPOINTS"] == ",".join(endpoints)


def test_kueue_has_not_admitted_it_simulated(
    cluster: Cluster, start_operator: StartOperator, kube: Kube, node: ProcessNode, jobs: Jobs, namespace: str
):
    """Kueue is played by the test: its Workload says why, and the Job is unsuspended by hand."""
    kube.apply(WORKLOADS)
    path = f"/apis/kueue.x-k8s.io/v1beta1/namespaces/{namespace}/workloads"
    wait_until(lambda: _answers(kube, path), "Workloads are served")
    start_operator(kueue="enabled")
    jobs.create("nli", labels={"kueue.x-k8s.io/queue-name": "gpus", "kueue.x-k8s.io/priority-class": "high"})
    child = wait_until(lambda: jobs.children("nli"), "its Job")[0]
    assert child["spec"]["suspend"] is True
    assert child["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    sentence = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu"
    condition = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": sentence}
    labels = {"kueue.x-k8s.io/job-uid": child["metadata"]["uid"]}
    workload = {
        "apiVersion": "kueue.x-k8s.io/v1beta1",
        "kind": "Workload",
        "metadata": {"name": "job-nli-1", "labels": labels},
        "status": {"conditions": [condition]},
    }
    kube.request("POST", path, workload)
    wait_until(lambda: sentence in jobs.condition("nli", "Scheduled").get("message", ""), "Kueue's sentence")
    assert jobs.status("nli")["phase"] == "Queued"
    assert kube.get("Job", "nli-1")["spec"]["suspend"] is True
    toleration = {"key": "pool", "operator": "Exists"}
    template = {"spec": {"tolerations": [toleration]}}
    kube.patch("Job", "nli-1", {"spec": {"suspend": False, "template": template}})
    assert jobs.wait_over("nli")["status"] == "True"


def _answers(kube: Kube, path: str) -> bool:
    try:
        kube.request("GET", path)
    except Exception:
        return False
    return True
