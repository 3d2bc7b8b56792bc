"""One operator for every namespace, under exactly the chart's ClusterRole (real kube-apiserver; simulated trainers)."""

from pathlib import Path

import pytest

from finetune_api import constants
from support.docs.chart import find, objects
from support.node import fake_trainer
from support.node.node import ProcessNode
from support.operator import process
from support.server.audit_log import (
    ACCOUNT,
    about_resources,
    job,
    refused,
    rights,
    used,
)
from support.server.client import Kube, wait_until
from support.server.server import Cluster

VALUES = {"watch": {"allNamespaces": True}}


def test_jobs_of_two_namespaces_run_and_nothing_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    if not cluster.is_real:
        pytest.skip("the stand-in API server has no RBAC: `make envtest` fetches the real one")
    path = {"PATH": fake_trainer.install(tmp_path / "bin")}
    with cluster.namespace("system") as system, cluster.namespace("a") as first, cluster.namespace("b") as second:
        found = objects(VALUES, system)
        kube = Kube(cluster.access, system)
        role, binding = find(found, "ClusterRole", ACCOUNT), find(found, "ClusterRoleBinding", ACCOUNT)
        for obj in (find(found, "ServiceAccount"), role, binding):
            kube.create(obj)
        kubeconfig = cluster.access_of_service_account(system, ACCOUNT).write_kubeconfig(tmp_path / "kubeconfig")
        with (
            ProcessNode(cluster, first, tmp_path / "first", env=path),
            ProcessNode(cluster, second, tmp_path / "second", env=path),
            process.running(kubeconfig, tmp_path / "operator", {"namespaces": []}),
        ):
            for namespace in (first, second):
                kube.create(job("good", "succeed") | {"metadata": {"name": "good", "namespace": namespace}})

            def done(namespace: str) -> bool:
                return (kube.get(constants.KIND, "good", namespace).get("status") or {}).get("phase") == "Succeeded"

            for namespace in (first, second):
                wait_until(lambda namespace=namespace: done(namespace), f"the job in {namespace} succeeds", 60)
            events = about_resources(cluster, system, first, second)
        for obj in (binding, role):
            kube.delete(obj["kind"], ACCOUNT)
        kube.close()
    assert refused(events) == []
    assert used(events) <= rights(role["rules"])
