"""Fixtures around a Kubernetes API, and a line in the report that says which one the tests ran against."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from support.server import server as clusters
from support.server.client import Kube
from support.server.server import Cluster

Start = Callable[[str], Cluster]


def pytest_report_header(config: pytest.Config) -> str:
    return f"cluster: {clusters.describe(clusters.chosen())}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.verbosity >= 0:
        terminalreporter.write_line(f"cluster: {clusters.describe(clusters.chosen())}")


@pytest.fixture(scope="session")
def start_cluster() -> Iterator[Start]:
    """Gives the cluster of a kind; each is started at the first call and stopped at the end of the session."""
    running: dict[str, Cluster] = {}
    with ExitStack() as stack:

        def start(kind: str) -> Cluster:
            if kind not in running:
                running[kind] = stack.enter_context(clusters.start(kind))
            return running[kind]

        yield start


@pytest.fixture(scope="session")
def cluster(start_cluster: Start) -> Cluster:
    """A running Kubernetes API with the FineTuneJob CRD; one per pytest worker, see support/cluster.py."""
    return start_cluster(clusters.chosen())


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own."""
    with cluster.namespace() as name:
        yield name


@pytest.fixture
def kube(cluster: Cluster, namespace: str) -> Iterator[Kube]:
    """A client whose default namespace is the test's."""
    client = Kube(cluster.access, namespace)
    yield client
    client.close()


@pytest.fixture(scope="session", params=clusters.available())
def every_cluster(request: pytest.FixtureRequest, start_cluster: Start) -> Cluster:
    """Each kind of cluster that can run here in turn: what holds for one has to hold for all."""
    return start_cluster(request.param)


@pytest.fixture
def everywhere(every_cluster: Cluster) -> Iterator[Kube]:
    """A client for a fresh namespace of each kind of cluster."""
    yield from _client(every_cluster)


@pytest.fixture(scope="session", params=sorted({clusters.chosen(), clusters.STANDIN}))
def either_cluster(request: pytest.FixtureRequest, start_cluster: Start) -> Cluster:
    """The cluster that tests run against, and the stand-in, for they have to answer alike."""
    return start_cluster(request.param)


@pytest.fixture
def either(either_cluster: Cluster) -> Iterator[Kube]:
    """A client for a fresh namespace of either cluster."""
    yield from _client(either_cluster)


def _client(cluster: Cluster) -> Iterator[Kube]:
    with cluster.namespace() as name:
        client = Kube(cluster.access, name)
        yield client
        client.close()
