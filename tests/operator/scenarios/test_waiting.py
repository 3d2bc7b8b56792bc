"""Why a job waits: in Scheduled's message, in Kubernetes' own words."""

import base64
import time

import pytest

from finetune_api import constants
from support.node.node import ProcessNode
from support.operator.fixtures import Jobs
from support.operator.process import OperatorProcess
from support.server.client import STRATEGIC, Kube, Object, wait_until
from support.server.server import Cluster

QUOTA = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}}


def test_no_node_will_take_it_simulated(operator: OperatorProcess, node: ProcessNode, jobs: Jobs):
    sentence = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    node.simulate_unschedulable(sentence)
    jobs.create("nli", pendingDeadlineSeconds=3600)
    said = jobs.wait("nli", "Scheduled", "False", "Unschedulable")
    assert said["message"] == sentence
    assert jobs.condition("nli", "Succeeded") | {"status": "Unknown", "message": sentence} == jobs.condition(
        "nli", "Succeeded"
    )
    wait_until(lambda: [e for e in jobs.events("nli") if e["reason"] == "Unschedulable"], "an event")
    node.simulate_unschedulable(None)
    assert jobs.wait_over("nli")["status"] == "True"


def test_its_image_cannot_be_pulled_simulated(operator: OperatorProcess, node: ProcessNode, jobs: Jobs):
    node.simulate_pull_error("finetune-trainer:0.1.0", "manifest unknown")
    jobs.create("nli")
    said = jobs.wait("nli", "Scheduled", "False", "ImagePullBackOff")
    assert "manifest unknown" in said["message"]


def test_its_init_container_waits_and_then_fails_simulated(
    operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    """The test plays the kubelet of a pod to which a webhook has added an init container."""
    node.simulate_unschedulable("held")
    jobs.create("nli", recovery={"maxAttempts": 1})
    jobs.wait("nli", "Scheduled", "False", "Unschedulable")
    (pod,) = kube.list("Pod", labelSelector=f"{constants.LABEL_JOB}=nli")

    def report(phase: str, state: dict[str, object]) -> None:
        init = {"name": "mesh", "image": "mesh:1", "imageID": "", "ready": False, "restartCount": 0, "state": state}
        scheduled = {"type": "PodScheduled", "status": "True"}
        status = {"phase": phase, "conditions": [scheduled], "initContainerStatuses": [init]}
        kube.patch("Pod", pod["metadata"]["name"], {"status": status}, subresource="status", content_type=STRATEGIC)

    report("Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "manifest unknown"}})
    assert (
        jobs.wait("nli", "Scheduled", "False", "ImagePullBackOff")["message"] == "init container mesh: manifest unknown"
    )
    report("Failed", {"terminated": {"exitCode": 126, "reason": "Error", "message": "iptables: Permission denied"}})
    over = jobs.wait_over("nli")
    assert over["reason"] == "InitContainerFailed"
    assert "init container mesh of pod" in over["message"] and over["message"].endswith("iptables: Permission denied")


def test_its_secret_is_missing(operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs):
    jobs.create("nli", output={"uri": "s3://adapters/nli", "secretRef": {"name": "s3-key"}})
    said = jobs.wait("nli", "Scheduled", "False", "FailedMount")
    assert 'secret "s3-key" not found' in said["message"]
    data = {"AWS_ACCESS_KEY_ID": base64.b64encode(b"id").decode()}
    kube.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3-key"}, "data": data})
    assert jobs.wait_over("nli")["status"] == "True"


def test_an_event_in_another_namespace_says_nothing_of_our_jobs(
    cluster: Cluster, operator: OperatorProcess, kube: Kube, jobs: Jobs
):
    """Whoever may write events there may name the uid of any pod."""
    if not cluster.has_job_controller:
        pytest.skip("needs the real Job controller")

    def pod_of(name: str) -> Object:
        jobs.create(name)
        return wait_until(lambda: kube.list("Pod", labelSelector=f"finetune.dev/job={name}"), "its pod")[0]

    def tell(message: str, pod: Object, namespace: str) -> None:
        about = {"kind": "Pod", "name": "a", "namespace": namespace, "uid": pod["metadata"]["uid"]}
        event = {"apiVersion": "v1", "kind": "Event", "metadata": {"generateName": "told-", "namespace": namespace}}
        kube.create({**event, "involvedObject": about, "reason": "FailedMount", "message": message})

    def wait_told(name: str, message: str) -> None:
        wait_until(lambda: jobs.condition(name, "Scheduled").get("message") == message, f"{name}: {message}")

    one, two, ours = pod_of("one"), pod_of("two"), str(kube.namespace)
    tell("ours", one, ours)
    wait_told("one", "ours")
    with cluster.namespace("other") as theirs:
        tell("theirs", one, theirs)
        tell("theirs", two, theirs)
        tell("ours, later", two, ours)
        wait_told("two", "ours, later")
    assert jobs.condition("one", "Scheduled")["message"] == "ours"


def test_its_volume_claim_is_missing(operator: OperatorProcess, node: ProcessNode, jobs: Jobs):
    jobs.create("nli", cache={"claimName": "model-cache"})
    said = jobs.wait("nli", "Scheduled", "False", "Unschedulable")
    assert 'persistentvolumeclaim "model-cache" not found' in said["message"]


def test_the_quota_has_no_pod_left(cluster: Cluster, operator: OperatorProcess, kube: Kube, jobs: Jobs):
    if not cluster.has_job_controller:
        pytest.skip("needs the real Job controller")
    kube.create(QUOTA | {"spec": {"hard": {"pods": "0"}}})
    wait_until(lambda: "hard" in kube.get("ResourceQuota", "none").get("status", {}), "the quota is counted")
    jobs.create("nli")
    said = jobs.wait("nli", "Scheduled", "False", "FailedCreate")
    assert "exceeded quota: none" in said["message"]


def test_the_quota_has_no_job_left(cluster: Cluster, operator: OperatorProcess, kube: Kube, jobs: Jobs):
    if not cluster.is_real:
        pytest.skip("needs the real admission control")
    hard = {"count/jobs.batch": "0"}
    kube.create(QUOTA | {"spec": {"hard": hard}})
    # as the controller manager counts it, where there is one
    kube.patch("ResourceQuota", "none", {"status": {"hard": hard, "used": hard}}, subresource="status")
    jobs.create("nli", pendingDeadlineSeconds=3600)
    said = jobs.wait("nli", "Scheduled", "False", "QuotaExceeded")
    assert "exceeded quota: none" in said["message"]
    assert jobs.reasons("nli") == [], "what could not be made is no attempt"
    kube.delete("ResourceQuota", "none")
    jobs.wait("nli", "Scheduled", "False", "Pending")
    assert jobs.reasons("nli") == [None]


def test_a_pod_the_api_server_rejects(cluster: Cluster, operator: OperatorProcess, jobs: Jobs):
    if not cluster.is_real:
        pytest.skip("needs the real validation")
    toleration = {"key": "spot", "operator": "Exists", "value": "yes"}
    jobs.create("nli", resources={"gpusPerNode": 0, "tolerations": [toleration]})
    said = jobs.wait("nli", "Scheduled", "False", "Rejected")
    assert "value must be empty when `operator` is 'Exists'" in said["message"]


def test_the_pending_deadline_ends_the_wait_and_keeps_its_reason_simulated(
    operator: OperatorProcess, node: ProcessNode, jobs: Jobs
):
    node.simulate_unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    jobs.create("nli", pendingDeadlineSeconds=3)
    over = jobs.wait_over("nli")
    assert over["reason"] == "PendingDeadlineExceeded"
    assert "3 Insufficient nvidia.com/gpu" in over["message"]
    wait_until(lambda: not jobs.children("nli"), "the Job that waits is gone")


def test_kueue_admits_and_evicts_and_admits_again_simulated(
    cluster: Cluster, operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    if not cluster.has_job_controller:
        pytest.skip("needs the real Job controller")
    jobs.create("nli", "run", labels={constants.LABEL_KUEUE_QUEUE: "gpu"}, activeDeadlineSeconds=3600)

    def is_allowed(yes: bool) -> None:
        kube.patch("Job", "nli-1", {"spec": {"suspend": not yes}})

    def seconds_run() -> int:
        return int(jobs.status("nli")["attempts"][0].get("runSeconds", 0))

    for runs in (1, 2):
        said = jobs.wait("nli", "Scheduled", "False", "Queued")
        assert "waiting for Kueue to admit it" in said["message"]
        assert (jobs.status("nli")["phase"], jobs.condition("nli", "Training")["reason"]) == ("Queued", "NotRunning")
        is_allowed(True)
        jobs.wait("nli", "Training", "True")
        time.sleep(2)  # Kubernetes tells times in whole seconds: let there be some to record
        is_allowed(False)
        jobs.wait("nli", "Scheduled", "False", "Queued")
        wait_until(lambda: not node.pids(), "the trainer has stopped")
        logs = node.all_logs()
        assert logs.count("exit 75") == runs, "it saved a checkpoint before it stopped"
        wait_until(lambda before=2 * (runs - 1): seconds_run() >= before + 2, "its time is recorded")
    assert jobs.reasons("nli") == [None], "evictions are not attempts"
    assert len(jobs.children("nli")) == 1
