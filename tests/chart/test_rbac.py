"""The operator's rights are exactly what it uses, by the API server's own audit log (real kube-apiserver only).

The trainers are simulated, so that a job's whole life takes seconds; operator, RBAC and API server are the real ones.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api import constants
from support.docs.chart import find, objects
from support.node import fake_trainer
from support.node.node import ProcessNode
from support.operator import process
from support.operator.process import OperatorProcess
from support.server.audit_log import (
    ACCOUNT,
    about_resources,
    job,
    refused,
    resource_of,
    rights,
    used,
)
from support.server.client import (
    ApiError,
    Kube,
    Object,
    wait_until,
)
from support.server.kueue import WORKLOADS
from support.server.server import Cluster


class Place:
    """A namespace with the chart's ServiceAccount and Role in it, and an operator that acts as that account."""

    def __init__(self, cluster: Cluster, kube: Kube, operator: OperatorProcess, account: Kube, role: Object) -> None:
        self.cluster, self.kube, self.operator, self.account, self.role = cluster, kube, operator, account, role
        self.life: list[Object] = []
        """What was audited while the operator lived through everything, and nobody else acted as its account."""

    def condition(self, name: str, kind: str) -> Object:
        found = (self.kube.find(constants.KIND, name) or {}).get("status", {}).get("conditions", [])
        return next((c for c in found if c["type"] == kind), {})

    def until(self, name: str, kind: str, status: str, reason: str | None = None) -> None:
        def look() -> bool:
            found = self.condition(name, kind)
            return found.get("status") == status and reason in (None, found.get("reason"))

        wait_until(look, f"{name} is {kind}={status} {reason or ''}", 60)

    def audited(self) -> list[Object]:
        """The account's requests that are about resources; what every user may ask (discovery) is not."""
        return about_resources(self.cluster, str(self.kube.namespace))


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if not cluster.is_real:
        pytest.skip("the stand-in API server has no RBAC: `make envtest` fetches the real one")
    folder: Path = tmp_path_factory.mktemp("rbac")
    with cluster.namespace("rbac") as namespace:
        kube = Kube(cluster.access, namespace)
        kube.apply(WORKLOADS)
        wait_until(lambda: _serves(kube, "/apis/kueue.x-k8s.io/v1beta1"), "Workloads are served")
        found = objects(namespace=namespace)
        for kind in ("ServiceAccount", "Role", "RoleBinding"):
            kube.create(find(found, kind))
        access = cluster.access_of_service_account(namespace, ACCOUNT)
        kubeconfig = access.write_kubeconfig(folder / "kubeconfig")
        path = {"PATH": fake_trainer.install(folder / "bin")}
        settings = {"namespaces": [namespace], "isolated_namespaces": [namespace]}
        settings |= {"stalled_seconds": 5, "termination_grace_seconds": 5}
        account = Kube(access, namespace)
        with (
            ProcessNode(cluster, namespace, folder, env=path) as node,
            process.running(kubeconfig, folder / "operator", settings) as operator,
        ):
            del node
            place = Place(cluster, kube, operator, account, find(found, "Role"))
            live_a_life(place)
            place.life = place.audited()
            yield place
        account.close()
        kube.delete("CustomResourceDefinition", WORKLOADS["metadata"]["name"])
        kube.close()


def _serves(kube: Kube, path: str) -> bool:
    try:
        kube.request("GET", path)
    except ApiError:
        return False
    return True


def live_a_life(place: Place) -> None:
    """Everything that can happen to jobs: success, failures, retries, suspension, deletion, TTL, conflicts."""
    kube = place.kube
    kube.create(job("good", "succeed", ttlSecondsAfterFinished=0))
    kube.create(job("retried", "fail-69/succeed"))
    kube.create(job("hopeless", "fail-65"))
    kube.create(job("nodes", "fail-69/succeed", resources={"nodes": 2, "gpusPerNode": 0}))
    kube.create(job("paused", "run/succeed"))
    kube.create(job("deleted", "run"))
    kube.create(job("late", "run", activeDeadlineSeconds=3))
    taken = {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "a", "image": "b"}]}}}
    kube.create(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "taken-1"}, "spec": {**taken, "suspend": True}}
    )
    kube.create(job("taken", "succeed"))
    wait_until(lambda: kube.find(constants.KIND, "good") is None, "the finished job is gone after its TTL", 90)
    place.until("paused", "Training", "True")
    kube.patch(constants.KIND, "paused", {"spec": {"suspend": True}})
    place.until("deleted", "Training", "True")
    kube.delete(constants.KIND, "deleted", propagationPolicy="Background")
    place.until("hopeless", "Succeeded", "False", "DatasetInvalid")
    place.until("retried", "Succeeded", "True")
    place.until("nodes", "Succeeded", "True")
    place.until("late", "Succeeded", "False")
    place.until("taken", "Scheduled", "False", "NameConflict")
    place.until("paused", "Suspended", "True")
    kube.patch(constants.KIND, "paused", {"spec": {"suspend": False}})
    place.until("paused", "Succeeded", "True")
    sweep(place)
    meet_conflicts(place)


def sweep(place: Place) -> None:
    """A sweep of two trials is suspended, resumed, finished, and deleted after its TTL."""
    template = {**job("swept", "run/succeed")["spec"], "output": {"uri": "s3://adapters/swept"}}
    modules = [f"{number:0>128}" for number in range(64)]  # more than stays in memory: the sweep is read again
    trials = [{"name": name, "values": {"lora.targetModules": modules}} for name in ("a", "b")]
    objective, spec = {"metric": "trainLoss"}, {"parallelism": 1, "ttlSecondsAfterFinished": 0}
    made = {"apiVersion": constants.API_VERSION, "kind": constants.SWEEP_KIND, "metadata": {"name": "swept"}}
    place.kube.create(made | {"spec": {"template": template, "trials": trials, "objective": objective, **spec}})
    place.until("swept-a", "Training", "True")
    place.kube.patch(constants.SWEEP_KIND, "swept", {"spec": {"suspend": True}})
    place.until("swept-a", "Suspended", "True")
    place.kube.patch(constants.SWEEP_KIND, "swept", {"spec": {"suspend": False}})
    place.until("swept-b", "Training", "True")
    place.kube.patch(constants.KIND, "swept-b", {"spec": {"activeDeadlineSeconds": 1}})
    wait_until(lambda: place.kube.find(constants.SWEEP_KIND, "swept") is None, "the sweep is gone after its TTL", 90)


def meet_conflicts(place: Place) -> None:
    """Somebody else writes to jobs all the time, until the operator has had to look at one again."""
    right = (constants.GROUP, constants.PLURAL, "get")
    for number in range(20):
        name = f"contested-{number}"
        place.kube.create(job(name, "succeed"))
        for turn in range(200):
            place.kube.patch(constants.KIND, name, {"metadata": {"annotations": {"turn": str(turn)}}})
            if place.condition(name, "Succeeded").get("status") == "True":
                break
        if right in used(place.audited()):
            return
    raise AssertionError("no status patch ever met a conflict")


def test_no_request_of_the_operator_was_refused(place: Place) -> None:
    assert refused(place.life) == []
    assert not place.operator.metric("finetune_operator_api_requests_total", code="403")


def test_every_right_of_the_role_is_used_and_nothing_else_was_asked_for(place: Place) -> None:
    assert used(place.life) == rights(place.role["rules"])


def test_the_operators_own_count_of_requests_agrees_with_the_servers_log(place: Place) -> None:
    def agrees(verb: str, resource: str) -> bool:
        logged = [e for e in place.audited() if (e["verb"], resource_of(e)) == (verb, resource)]
        counted = place.operator.metric("finetune_operator_api_requests_total", verb=verb, resource=resource)
        return counted == len(logged) > 0

    for verb, resource in (("patch", "finetunejobs/status"), ("create", "jobs"), ("delete", "jobs"), ("patch", "jobs")):
        wait_until(lambda verb=verb, resource=resource: agrees(verb, resource), f"{verb} {resource} are counted alike")


FORBIDDEN = [
    ("GET", "/api/v1/namespaces/{ns}/secrets"),
    ("GET", "/api/v1/namespaces/{ns}/secrets/any"),
    ("POST", "/api/v1/namespaces/{ns}/secrets"),
    ("POST", "/api/v1/namespaces/{ns}/pods"),
    ("DELETE", "/api/v1/namespaces/{ns}/pods/any"),
    ("GET", "/api/v1/namespaces/{ns}/pods/any/log"),
    ("POST", "/api/v1/namespaces/{ns}/pods/any/exec"),
    ("GET", "/api/v1/namespaces/{ns}/configmaps"),
    ("DELETE", "/api/v1/namespaces/{ns}/configmaps/any"),
    ("PATCH", "/apis/finetune.dev/v1alpha1/namespaces/{ns}/finetunesweeps/any"),
    ("POST", "/apis/finetune.dev/v1alpha1/namespaces/{ns}/finetunesweeps"),
    ("GET", "/apis/rbac.authorization.k8s.io/v1/namespaces/{ns}/roles"),
    ("POST", "/api/v1/namespaces/{ns}/serviceaccounts/" + ACCOUNT + "/token"),
    ("GET", "/api/v1/namespaces"),
    ("GET", "/api/v1/nodes"),
    ("GET", "/apis/finetune.dev/v1alpha1/finetunejobs"),
    ("GET", "/apis/finetune.dev/v1alpha1/namespaces/default/finetunejobs"),
    ("GET", "/api/v1/namespaces/default/pods"),
]


def test_the_account_may_do_nothing_else(place: Place) -> None:
    allowed = []
    for method, path in FORBIDDEN:
        try:
            place.account.request(method, path.format(ns=place.kube.namespace), {} if method != "GET" else None)
        except ApiError as error:
            if error.code == 403:
                continue
        allowed.append(f"{method} {path}")
    assert allowed == []
