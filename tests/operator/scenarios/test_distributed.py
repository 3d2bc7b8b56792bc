"""Several nodes: torchrun's real rendezvous between two pods of the process node (the trainer itself simulated)."""

from support.node.node import ProcessNode
from support.operator.fixtures import Jobs
from support.operator.process import OperatorProcess
from support.server.client import Kube, wait_until

TWO_NODES = {"nodes": 2, "gpusPerNode": 0}


def pods(kube: Kube, job: str) -> list[str]:
    """Names of the running pods of that Job, by rank."""
    found = kube.list("Pod", labelSelector=f"job-name={job}")
    running = [p for p in found if p.get("status", {}).get("phase") == "Running"]
    ranked = sorted(running, key=lambda p: p["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])
    return [pod["metadata"]["name"] for pod in ranked]


def test_two_pods_find_each_other_and_train_as_one(
    operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    made = jobs.create("nli", resources=TWO_NODES, suspend=True)
    jobs.wait("nli", "Suspended", "True")
    owner = {"apiVersion": made["apiVersion"], "kind": made["kind"], "name": "nli", "uid": made["metadata"]["uid"]}
    metadata = {"name": "nli-nodes", "ownerReferences": [owner | {"controller": True}]}
    spec = {"clusterIP": "None", "selector": {"app": "evil"}, "ports": [{"port": 29500}]}
    kube.create({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
    jobs.change("nli", suspend=False)
    said = jobs.wait("nli", "Scheduled", "False", "NameConflict")
    assert "its spec.publishNotReadyAddresses, spec.selector, spec.ports is not what this operator" in said["message"]
    kube.delete("Service", "nli-nodes")
    assert jobs.wait_over("nli", 120)["status"] == "True"
    service = kube.get("Service", "nli-nodes")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    logs = node.all_logs()
    assert "rank 0 of 2" in logs and "rank 1 of 2" in logs
    assert len(jobs.children("nli")) == 1


def test_one_lost_pod_starts_the_whole_attempt_anew(
    operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    jobs.create("nli", "run/succeed", resources=TWO_NODES, recovery={"maxAttempts": 1, "backoffSeconds": 1})
    both = wait_until(lambda: len(found := pods(kube, "nli-1")) == 2 and found, "two running pods", 60)
    jobs.wait("nli", "Training", "True", seconds=120)
    kube.delete("Pod", both[1])
    assert jobs.wait_over("nli", 120)["status"] == "True"
    assert jobs.reasons("nli") == ["Preempted", "Succeeded"]
