"""Fixtures for tests of the operator on a Kubernetes API: its process, a process node, and scripted trainers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.node import fake_trainer
from support.node.node import ProcessNode
from support.operator.process import OperatorProcess, running
from support.server.client import Kube, wait_until
from support.server.server import Cluster

Object = dict[str, Any]


def manifest(name: str, story: str = "succeed", labels: dict[str, str] | None = None, **spec: Any) -> Object:
    """A FineTuneJob whose simulated trainer tells `story` (see fake_trainer.py)."""
    given = {
        "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
        "dataset": {"train": f"s3://simulated/{story}"},
        "output": {"uri": f"s3://adapters/{name}"},
        "resources": {"gpusPerNode": 0},
        "recovery": {"backoffSeconds": 1},
    }
    metadata = {"name": name, "labels": labels or {}}
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": metadata, "spec": given | spec}


class Jobs:
    """FineTuneJobs of one namespace, as a user sees them."""

    def __init__(self, kube: Kube) -> None:
        self.kube = kube

    def create(self, name: str, story: str = "succeed", **more: Any) -> Object:
        return self.kube.create(manifest(name, story, **more))

    def status(self, name: str) -> Object:
        return self.kube.get("FineTuneJob", name).get("status") or {}

    def condition(self, name: str, kind: str) -> Object:
        return next((c for c in self.status(name).get("conditions", []) if c["type"] == kind), {})

    def reasons(self, name: str) -> list[str | None]:
        """How each attempt ended; None for the one under way."""
        return [attempt.get("reason") for attempt in self.status(name).get("attempts", [])]

    def change(self, name: str, **spec: Any) -> Object:
        return self.kube.patch("FineTuneJob", name, {"spec": spec})

    def wait(self, name: str, kind: str, status: str, reason: str | None = None, seconds: float = 60) -> Object:
        """The condition, once it has that status (and reason)."""

        def look() -> Object | None:
            found = self.condition(name, kind)
            fits = found.get("status") == status and reason in (None, found.get("reason"))
            return found if fits else None

        return wait_until(look, f"{name}: {kind}={status} {reason or ''}", seconds)

    def wait_over(self, name: str, seconds: float = 60) -> Object:
        """The Succeeded condition, once it is True or False."""
        kind = "Succeeded"
        return wait_until(
            lambda: (c := self.condition(name, kind)).get("status") in ("True", "False") and c,
            f"{name} is over",
            seconds,
        )

    def events(self, name: str) -> list[Object]:
        """Events about the FineTuneJob."""
        found = self.kube.list("Event", fieldSelector=f"involvedObject.kind=FineTuneJob,involvedObject.name={name}")
        return [event for event in found if event["involvedObject"]["name"] == name]

    def children(self, name: str) -> list[Object]:
        """Its Jobs, by attempt."""
        found = self.kube.list("Job", labelSelector=f"finetune.dev/job={name}")
        return sorted(found, key=lambda job: int(job["metadata"]["labels"]["finetune.dev/attempt"]))


@pytest.fixture
def jobs(kube: Kube) -> Jobs:
    """FineTuneJobs of the test's namespace."""
    return Jobs(kube)


@pytest.fixture
def node(cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[ProcessNode]:
    """A node of local processes on which finetune-trainer is the simulated one."""
    path = fake_trainer.install(tmp_path / "bin")
    with ProcessNode(cluster, namespace, tmp_path, env={"PATH": path}) as running_node:
        yield running_node


class StartOperator:
    """Start operators for one namespace, with the settings given; `started` are those so far."""

    def __init__(self, cluster: Cluster, namespace: str, folder: Path) -> None:
        self.started: list[OperatorProcess] = []
        self._cluster, self._namespace, self._folder = cluster, namespace, folder

    def __call__(self, **settings: Any) -> OperatorProcess:
        folder = self._folder / f"operator-{len(self.started)}"
        folder.mkdir()
        operator = OperatorProcess(self._cluster.kubeconfig, folder, {"namespaces": [self._namespace], **settings})
        self.started.append(operator)
        return operator.wait_ready()


@pytest.fixture
def start_operator(cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[StartOperator]:
    """Start operators for the test's namespace; they are stopped at the end."""
    start = StartOperator(cluster, namespace, tmp_path)
    yield start
    for operator in start.started:
        operator.process.stop()


@pytest.fixture
def own_operator(start_operator: StartOperator) -> OperatorProcess:
    """A running operator for the test's namespace alone."""
    return start_operator()


@pytest.fixture(scope="module")
def operator(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """A running operator for every namespace, shared by the tests of a module."""
    with running(cluster.kubeconfig, tmp_path_factory.mktemp("operator")) as shared:
        yield shared
