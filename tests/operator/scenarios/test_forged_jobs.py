"""Jobs that a user forges as attempts, on a Kubernetes API: none is taken for one, and none is left."""

from finetune_api import constants
from support.node.node import ProcessNode
from support.operator.fixtures import Jobs, StartOperator
from support.server.client import Kube, Object, wait_until


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
    operator = start_operator()
    made = jobs.create("nli", "run/succeed", suspend=True)
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
    operator.process.kill()
    start_operator()
    kube.patch("Job", "nli-2", {"spec": {"parallelism": 0}})
    jobs.wait("nli", "Scheduled", "False", "ParallelismChanged")
    jobs.change("nli", activeDeadlineSeconds=1)
    assert jobs.wait_over("nli")["reason"] == "DeadlineExceeded"
    wait_until(lambda: not node.pids() and not kube.list("Job"), "nothing runs after the end", 60)
