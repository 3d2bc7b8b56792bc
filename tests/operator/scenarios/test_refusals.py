"""What the API server refuses to make, on a Kubernetes API: the job waits, says why, and follows the user meanwhile."""

import json

import pytest

from finetune_api import constants
from support.operator.fixtures import Jobs
from support.operator.process import OperatorProcess
from support.server.client import Kube, wait_until
from support.server.server import Cluster

QUOTA = {
    "apiVersion": "v1",
    "kind": "ResourceQuota",
    "metadata": {"name": "none"},
    "spec": {"hard": {"count/jobs.batch": "0"}},
}


@pytest.fixture(autouse=True)
def needs_real_controllers(cluster: Cluster) -> None:
    if not cluster.has_job_controller:
        pytest.skip("needs quotas and namespaces as Kubernetes keeps them: `make envtest` fetches the real ones")


def test_an_edit_while_a_quota_refuses_the_job_reaches_the_trainer(
    own_operator: OperatorProcess, kube: Kube, jobs: Jobs
):
    kube.create(QUOTA)
    wait_until(lambda: "hard" in kube.get("ResourceQuota", "none").get("status", {}), "the quota holds")
    jobs.create("nli", training={"epochs": 1})
    said = jobs.wait("nli", "Scheduled", "False", "QuotaExceeded")
    assert "count/jobs.batch" in said["message"]
    jobs.change("nli", training={"epochs": 7})
    kube.delete("ResourceQuota", "none")
    job = wait_until(lambda: kube.find("Job", "nli-1"), "the Job", 60)
    read = json.loads(job["spec"]["template"]["metadata"]["annotations"][constants.ANNOTATION_MANIFEST])
    assert read["spec"]["training"]["epochs"] == 7
