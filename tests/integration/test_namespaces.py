"""An operator of several namespaces serves on when one of them is gone (real kube-apiserver only: this is RBAC)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.docs.chart import find, objects
from support.operator.fixtures import Jobs
from support.operator.process import running
from support.server.audit_log import ACCOUNT
from support.server.client import Kube, wait_until
from support.server.server import Cluster

REFUSED = "finetune_operator_namespace_refused"


@pytest.fixture
def doomed(cluster: Cluster) -> Iterator[Kube]:
    if not cluster.is_real:
        pytest.skip("the stand-in API server has no RBAC: `make envtest` fetches the real one")
    with cluster.namespace("doomed") as name:
        client = Kube(cluster.access, name)
        yield client
        client.close()


def allow(kube: Kube, home: str) -> None:
    """Let the operator's account of namespace `home` work in the namespace of `kube`."""
    found = objects(namespace=home)
    role, binding = find(found, "Role"), find(found, "RoleBinding")
    for obj in (role, binding):
        obj["metadata"]["namespace"] = kube.namespace
        kube.create(obj)


def test_a_namespace_that_is_gone_stops_no_other(cluster: Cluster, kube: Kube, doomed: Kube, tmp_path: Path) -> None:
    home = str(kube.namespace)
    kube.create(find(objects(namespace=home), "ServiceAccount"))
    for client in (kube, doomed):
        allow(client, home)
    access = cluster.access_of_service_account(home, ACCOUNT)
    kubeconfig = access.write_kubeconfig(tmp_path / "kubeconfig")
    settings = {"namespaces": [home, doomed.namespace], "resync_seconds": 2, "start_timeout_seconds": 5}
    here, there = Jobs(kube), Jobs(doomed)

    def refused() -> float | None:
        return operator.metric(REFUSED, watched_namespace=str(doomed.namespace))

    with running(kubeconfig, tmp_path / "first", settings) as operator:
        there.create("nli")
        wait_until(lambda: there.children("nli"), "its Job")
        assert operator.metric(REFUSED) is None
        for kind in ("RoleBinding", "Role"):  # what the namespace controller may delete before all else
            doomed.delete(kind, find(objects(namespace=home), kind)["metadata"]["name"])
        wait_until(lambda: refused() == 403, "it says which namespace is refused")
        assert operator.metric("finetune_operator_jobs", namespace=str(doomed.namespace)) is None
        here.create("served")
        wait_until(lambda: here.children("served"), "the other namespace is served")
        assert operator.process.returncode is None
        assert "access to namespace denied" in operator.logs()

    with running(kubeconfig, tmp_path / "second", settings) as operator:
        assert refused() == 403
        here.create("after-a-restart")
        wait_until(lambda: here.children("after-a-restart"), "it starts all the same")
        there.create("later")
        allow(doomed, home)
        wait_until(lambda: there.children("later"), "the namespace is served once it may be", 60)
        assert refused() is None
        assert len(there.children("nli")) == 1, "and what ran there was taken for lost by nobody"


def test_when_all_are_refused_it_says_so_and_gives_up(cluster: Cluster, kube: Kube, tmp_path: Path) -> None:
    if not cluster.is_real:
        pytest.skip("the stand-in API server has no RBAC: `make envtest` fetches the real one")
    home = str(kube.namespace)
    kube.create(find(objects(namespace=home), "ServiceAccount"))
    kubeconfig = cluster.access_of_service_account(home, ACCOUNT).write_kubeconfig(tmp_path / "kubeconfig")
    settings = {"namespaces": [home], "start_timeout_seconds": 1}
    said = pytest.raises(AssertionError, match="cannot start: the API server denied the request")
    with said, running(kubeconfig, tmp_path / "operator", settings):
        pass
