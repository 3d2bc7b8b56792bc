"""Jobs that a user forges as attempts, on a Kubernetes API: none is taken for one, and none is left."""

import pytest

from finetune_api import constants
from support.node.node import ProcessNode
from support.operator.fixtures import Jobs, StartOperator
from support.operator.process import OperatorProcess
from support.server.client import Kube, Object, wait_until
from support.server.server import Cluster


def forged(job: Object, name: str) -> Object:
    """What somebody who may create Jobs can make: our owner reference and labels on another pod."""
    number = name.rpartition("-")[2]
    labels = {constants.LABEL_JOB: job["metadata"]["name"], constants.LABEL_ATTEMPT: number}
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "controller": True, "blockOwnerDeletion": False}
    owner |= {"name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
    container = {"name": "trainer", "image": "evil.example.com/x:1", "command": ["sleep", "600"]}
    template = {"metadata": {"labels": labels}, "spec": {"restartPolicy": "Never", "containers": [container]}}
    metadata = {"name": name, "labels": labels, "ownerReferences": [owner]}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": template}}


def test_a_forged_job_is_no_attempt_whether_nothing_runs_or_the_real_one(
    start_operator: StartOperator, node: ProcessNode, kube: Kube, jobs: Jobs
):
    start_operator()
    made = jobs.create("nli", "run", suspend=True)  # not "run/succeed": the real one must last until its deadline
    jobs.wait("nli", "Suspended", "True")
    kube.create(forged(made, "nli-1"))
    wait_until(lambda: jobs.reasons("nli") == ["JobRefused"] and not kube.list("Job"), "it is refused", 60)
    jobs.change("nli", suspend=False)
    jobs.wait("nli", "Training", "True")
    (real,) = kube.list("Job")
    assert jobs.status("nli")["attempts"][-1]["jobUid"] == real["metadata"]["uid"]
    kube.create(forged(made, "nli-9"))
    wait_until(lambda: [job["metadata"]["name"] for job in kube.list("Job")] == ["nli-2"], "only the real one", 60)
    kube.patch("Job", "nli-2", {"metadata": {"ownerReferences": None}})
    removed = "the owner reference to this job was removed from Job nli-2"
    wait_until(lambda: removed in jobs.condition("nli", "Scheduled").get("message", ""), "what was removed", 60)
    assert jobs.reasons("nli") == ["JobRefused", None]
    jobs.change("nli", activeDeadlineSeconds=1)
    assert jobs.wait_over("nli")["reason"] == "DeadlineExceeded"
    wait_until(lambda: not node.pids() and not kube.list("Job"), "nothing runs after the end", 60)


def test_a_job_whose_parallelism_somebody_sets_to_0_says_so(
    own_operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs, cluster: Cluster
):
    if not cluster.has_job_controller:
        pytest.skip("needs the real Job controller")
    jobs.create("nli", "run")
    jobs.wait("nli", "Training", "True")
    kube.patch("Job", "nli-1", {"spec": {"parallelism": 0}})
    said = jobs.wait("nli", "Scheduled", "False", "ParallelismChanged")
    assert "somebody else set parallelism of Job nli-1 to 0: set it back to 1" in said["message"]
