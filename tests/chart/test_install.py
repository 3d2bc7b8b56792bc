"""Install, upgrade, roll back and uninstall through Helm's own SDK, against a Kubernetes API."""

from collections.abc import Iterator
from typing import Any

import helm_python
import pytest

from finetune_api import constants, manifest
from finetune_operator.core.builders import job as children
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.settings import Settings
from support.docs.chart import (
    CHART,
    RELEASE,
    objects,
    values_of,
)
from support.server import server as clusters
from support.server.client import (
    ApiError,
    Kube,
    Object,
    wait_until,
)
from support.server.server import Cluster

#: Kind -> (path prefix, plural) of everything the chart makes that the API server knows by itself.
PLURALS = {
    "Deployment": ("/apis/apps/v1", "deployments"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
    "PriorityClass": ("/apis/scheduling.k8s.io/v1", "priorityclasses"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "Service": ("/api/v1", "services"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Secret": ("/api/v1", "secrets"),
    "Role": ("/apis/rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "rolebindings"),
    "ClusterRole": ("/apis/rbac.authorization.k8s.io/v1", "clusterroles"),
    "ClusterRoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "clusterrolebindings"),
    "CustomResourceDefinition": ("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions"),
}
CRDS = tuple(f"{plural}.{constants.GROUP}" for plural in (constants.PLURAL, constants.SWEEP_PLURAL))


def made(rendered: list[Object]) -> list[Object]:
    """What an install makes: all but hooks, which are made when they run."""
    return [obj for obj in rendered if "helm.sh/hook" not in obj["metadata"].get("annotations", {})]


class Installation:
    """Helm and a client, for one namespace of a cluster that has no FineTuneJob definition yet."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.kube = Kube(cluster.access, namespace)
        self.namespace = namespace
        # A release kept in Secrets, as by the helm command, needs a server that can keep them.
        self.helm = helm_python.Config(
            kubeconfig_path=cluster.kubeconfig,
            namespace=namespace,
            storage_driver="secret" if cluster.is_real else "memory",
        )

    def find(self, obj: Object) -> Object | None:
        prefix, plural = PLURALS[obj["kind"]]
        where = obj["metadata"].get("namespace")
        middle = f"/namespaces/{where}" if where else ""
        try:
            return self.kube.request("GET", f"{prefix}{middle}/{plural}/{obj['metadata']['name']}")
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def missing(self, wanted: list[Object]) -> set[tuple[str, str]]:
        """Kind and name of those that the server does not have."""
        return {(obj["kind"], obj["metadata"]["name"]) for obj in made(wanted) if self.find(obj) is None}

    def variables(self) -> dict[str, str]:
        deployment = self.kube.request(
            "GET", f"/apis/apps/v1/namespaces/{self.namespace}/deployments/{RELEASE}-finetune-operator"
        )
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        return {variable["name"]: variable["value"] for variable in container["env"]}

    def definitions(self) -> list[str]:
        """Return those of the chart that are there."""
        return [name for name in CRDS if self.kube.find("CustomResourceDefinition", name)]

    def serves_jobs(self) -> bool:
        try:
            self.kube.request("GET", f"/apis/{constants.API_VERSION}/{constants.PLURAL}")
        except ApiError:
            return False
        return True


@pytest.fixture(scope="module", params=sorted({clusters.chosen(), clusters.STANDIN}))
def fresh_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster of this module's own: the chart brings the definition that other tests want to keep."""
    with clusters.start(request.param) as running:
        for name in CRDS:
            running.kube.delete("CustomResourceDefinition", name)
        yield running


@pytest.fixture
def installation(fresh_cluster: Cluster) -> Iterator[Installation]:
    with fresh_cluster.namespace("helm") as namespace:
        found = Installation(fresh_cluster, namespace)
        yield found
        if found.helm.list():
            found.helm.uninstall(RELEASE)
        found.helm.close()
        for name in CRDS:
            if found.kube.find("CustomResourceDefinition", name):
                found.kube.delete("CustomResourceDefinition", name)
        wait_until(lambda: not found.definitions(), "the definitions are gone")
        found.kube.close()


def job(name: str) -> Object:
    spec = {
        "model": {"source": "hf://example/model"},
        "dataset": {"train": "s3://data/train.jsonl"},
        "output": {"uri": f"s3://adapters/{name}"},
    }
    return {"apiVersion": constants.API_VERSION, "kind": constants.KIND, "metadata": {"name": name}, "spec": spec}


def test_a_release_from_install_to_uninstall(installation: Installation, fresh_cluster: Cluster) -> None:
    here, helm = installation.namespace, installation.helm
    first = objects(namespace=here)
    helm.install(CHART, RELEASE, namespace=here)
    assert installation.missing(first) == set()
    wait_until(installation.serves_jobs, "FineTuneJobs are served")
    installation.kube.create(job("kept"))

    changed: dict[str, Any] = {
        "policy": {"maxGpusPerJob": 4},
        "priorityClass": {"create": True, "name": f"finetune-{here}"},
        "networkPolicy": {"enabled": False},
    }
    helm.upgrade(CHART, RELEASE, changed, namespace=here)
    second = objects(changed, here)
    assert installation.missing(second) == set()
    assert installation.variables()["FINETUNE_OPERATOR_MAX_GPUS_PER_JOB"] == "4"
    policies = {(o["kind"], o["metadata"]["name"]) for o in first if o["kind"] == "NetworkPolicy"}
    assert installation.missing(first) == policies

    helm.rollback(RELEASE, version=1)
    assert installation.missing(first) == set()
    if fresh_cluster.is_real:  # to take an entry out of a list needs field ownership, which the stand-in does not keep
        assert "FINETUNE_OPERATOR_MAX_GPUS_PER_JOB" not in installation.variables()
    assert installation.missing(second) == {("PriorityClass", f"finetune-{here}")}

    helm.uninstall(RELEASE)
    everything = {(o["kind"], o["metadata"]["name"]) for o in made(first)}
    assert everything - installation.missing(first) == {("CustomResourceDefinition", name) for name in CRDS}
    assert installation.kube.get(constants.KIND, "kept")["spec"]["model"]["source"] == "hf://example/model"


def test_what_was_kept_is_taken_up_by_the_next_install(installation: Installation) -> None:
    here, helm = installation.namespace, installation.helm
    helm.install(CHART, RELEASE, namespace=here)
    wait_until(installation.serves_jobs, "FineTuneJobs are served")
    installation.kube.create(job("kept"))
    helm.uninstall(RELEASE)
    helm.install(CHART, RELEASE, namespace=here)
    assert installation.missing(objects(namespace=here)) == set()
    assert installation.kube.get(constants.KIND, "kept")


def test_a_definition_that_may_go_goes(installation: Installation) -> None:
    installation.helm.install(CHART, RELEASE, {"crds": {"keep": False}}, namespace=installation.namespace)
    installation.helm.uninstall(RELEASE)
    wait_until(lambda: not installation.definitions(), "the definitions are gone")


@pytest.mark.parametrize("name", ["demo", "smallest"])
def test_other_values_files_install_too(installation: Installation, name: str) -> None:
    values = values_of(name)
    installation.helm.install(CHART, RELEASE, values, namespace=installation.namespace)
    assert installation.missing(objects(values, installation.namespace)) == set()
    installation.helm.uninstall(RELEASE)


def test_a_typo_stops_the_install_before_anything_is_made(installation: Installation) -> None:
    with pytest.raises(helm_python.HelmError, match="maxGpuPerJob"):
        installation.helm.install(CHART, RELEASE, {"policy": {"maxGpuPerJob": 4}}, namespace=installation.namespace)
    assert not installation.definitions()


def trainer_pod() -> Object:
    """A pod as the Job controller would make it from what the operator makes with its default settings."""
    obj = job("nli")
    obj["metadata"] |= {"namespace": "team", "uid": "1"}
    observed = JobObject.from_api(obj)
    *_, child = children.build(observed, manifest.check(manifest.Document(obj, "")).spec, 1, None, Settings())
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "trainer"},
        "spec": child["spec"]["template"]["spec"],
    }


def test_every_pod_is_admitted_to_a_restricted_namespace(installation: Installation, fresh_cluster: Cluster) -> None:
    """The operator's, a trainer's, the trial's and `helm test`'s, by the API server's own PodSecurity admission."""
    if not fresh_cluster.is_real:
        pytest.skip("the stand-in API server has no admission")
    enforce = {"pod-security.kubernetes.io/enforce": "restricted"}
    installation.kube.patch("Namespace", installation.namespace, {"metadata": {"labels": enforce}})
    values = values_of("demo")
    for obj in objects(values, installation.namespace):
        pod = obj["spec"]["template"] if obj["kind"] == "Deployment" else obj if obj["kind"] == "Pod" else None
        if pod:
            metadata = {"name": "candidate", "labels": pod["metadata"].get("labels", {})}
            candidate = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}
            installation.kube.create(candidate, dryRun="All")
    installation.kube.create(trainer_pod(), dryRun="All")
    root = {"name": "a", "image": "b", "securityContext": {"runAsUser": 0}}
    rooted = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "root"}, "spec": {"containers": [root]}}
    with pytest.raises(ApiError, match="violates PodSecurity"):
        installation.kube.create(rooted, dryRun="All")
