"""Labels of Jobs and pods that users and webhooks replace: never two trainers at once, and none left after the end."""

from collections.abc import Iterator

import pytest

from finetune_api import constants
from support.node.node import ProcessNode
from support.operator.fixtures import Jobs, StartOperator
from support.operator.process import OperatorProcess
from support.server.client import Kube, Object, wait_until
from support.server.server import Cluster

REMOVED = {"metadata": {"labels": {constants.LABEL_JOB: None, constants.LABEL_ATTEMPT: None}}}
REPLACED = {"metadata": {"labels": {constants.LABEL_JOB: "another", constants.LABEL_ATTEMPT: "7"}}}


def names(kube: Kube, kind: str) -> list[str]:
    """Everything of that kind in the namespace, whatever its labels."""
    return sorted(obj["metadata"]["name"] for obj in kube.list(kind))


@pytest.mark.parametrize("labels", [REMOVED, REPLACED], ids=["removed", "replaced"])
@pytest.mark.parametrize("kinds", [("Job",), ("Pod",), ("Job", "Pod")], ids=["job", "pod", "both"])
def test_an_attempt_goes_on_without_its_labels_and_is_stopped_at_the_end(
    kinds: tuple[str, ...], labels: Object, operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    jobs.create("nli", "run", recovery={"backoffSeconds": 0})
    jobs.wait("nli", "Training", "True")
    for kind in kinds:
        for name in names(kube, kind):
            kube.patch(kind, name, labels)
    step = jobs.status("nli")["progress"]["step"]
    wait_until(lambda: jobs.status("nli")["progress"]["step"] > step, "training goes on")
    if labels is REMOVED:
        said = wait_until(lambda: jobs.condition("nli", "Scheduled").get("message"), "what lacks a label")
        assert f"the label {constants.LABEL_JOB} was removed from {kinds[0]} nli-1" in said
    assert (names(kube, "Job"), len(node.pids()), jobs.reasons("nli")) == (["nli-1"], 1, [None])
    jobs.change("nli", activeDeadlineSeconds=1)
    assert jobs.wait_over("nli")["reason"] == "DeadlineExceeded"
    wait_until(lambda: not node.pids() and not names(kube, "Job"), "nothing runs after the end")


def test_a_restarted_operator_finds_an_attempt_that_lost_its_labels_while_it_was_away(
    start_operator: StartOperator, node: ProcessNode, kube: Kube, jobs: Jobs
):
    first = start_operator()
    jobs.create("nli", "run", recovery={"backoffSeconds": 0})
    jobs.wait("nli", "Training", "True")
    first.process.stop()
    for kind in ("Job", "Pod"):
        for name in names(kube, kind):
            kube.patch(kind, name, REMOVED)
    start_operator()
    wait_until(lambda: "was removed from" in jobs.condition("nli", "Scheduled").get("message", ""), "it looked")
    assert (names(kube, "Job"), len(node.pids()), jobs.reasons("nli")) == (["nli-1"], 1, [None])


@pytest.fixture
def webhook(cluster: Cluster, kube: Kube) -> Iterator[str]:
    """A policy of the cluster that removes our label from Jobs of the test's namespace as they are created."""
    if not cluster.is_real:
        pytest.skip("needs the real admission control")
    name, group = f"strip-{kube.namespace}", "admissionregistration.k8s.io/v1"
    key = constants.LABEL_JOB.replace("/", "~1")
    patch = f'[JSONPatch{{op: "remove", path: "/metadata/labels/{key}"}}]'
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    policy = {
        "apiVersion": group,
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "matchConstraints": {"resourceRules": [rule]},
            "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": patch}}],
        },
    }
    selector = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": kube.namespace}}}
    binding = {
        "apiVersion": group,
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {"policyName": name, "matchResources": selector},
    }
    made = [f"/apis/{group}/mutatingadmissionpolicies", f"/apis/{group}/mutatingadmissionpolicybindings"]
    for path, body in zip(made, (policy, binding), strict=True):
        kube.request("POST", path, body)
    container = {"name": "main", "image": "example.org/x:1"}
    probe: Object = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "probe", "labels": {constants.LABEL_JOB: "probe"}},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }

    def strips() -> bool:
        return constants.LABEL_JOB not in kube.create(probe, dryRun="All")["metadata"].get("labels", {})

    wait_until(strips, "the policy is in force", 60)
    yield name
    for path in made:
        kube.request("DELETE", f"{path}/{name}")


def test_a_job_that_comes_back_without_its_label_is_deleted_at_once_and_the_webhook_is_named(
    webhook: str, operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    jobs.create("nli", "run")
    said = jobs.wait("nli", "Scheduled", "False", "LabelsReplaced")
    assert f"without label {constants.LABEL_JOB}=nli" in said["message"]
    assert "admission webhook" in said["message"]
    assert jobs.reasons("nli") == []
    assert len(node.pids()) <= 1
