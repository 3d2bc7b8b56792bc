"""A job is followed at the pace of its changes, whatever the API server has forgotten, to its end or its deletion."""

import time
from collections.abc import Iterator

import pytest
import yaml

from finetune_cli.kube import client
from finetune_cli.kube.client import Cluster
from finetune_cli.kube.connect import connect
from support.cli.run import MANIFEST
from support.server.client import Kube
from support.server.server import STANDIN, start
from support.server.server import Cluster as Server

JOB = yaml.safe_load(MANIFEST)


@pytest.fixture(scope="module")
def forgetful() -> Iterator[Server]:
    """It remembers ten changes: a real one takes minutes to forget."""
    with start(STANDIN, history=10) as server:
        yield server


@pytest.fixture
def old(forgetful: Server) -> Iterator[tuple[Kube, Cluster]]:
    """A job whose latest change is forgotten."""
    with forgetful.namespace() as namespace:
        kube = Kube(forgetful.access, namespace)
        kube.create(JOB)
        kube.create(JOB | {"metadata": {"name": "busy"}})
        for number in range(20):
            kube.patch("FineTuneJob", "busy", {"metadata": {"annotations": {"turn": str(number)}}})
        yield kube, connect(namespace, None, forgetful.kubeconfig)
        kube.close()


def test_an_old_job_is_told_once_and_then_by_its_changes(old: tuple[Kube, Cluster]):
    kube, cluster = old
    told = cluster.follow("nli", time.monotonic() + 30)
    assert next(told) == kube.get("FineTuneJob", "nli")
    kube.patch("FineTuneJob", "nli", {"spec": {"suspend": True}})
    changed = next(told)
    assert changed and changed["spec"]["suspend"] is True
    kube.delete("FineTuneJob", "nli")
    assert list(told) == [None]


def test_the_server_is_not_asked_again_and_again(old: tuple[Kube, Cluster]):
    assert len(list(old[1].follow("nli", time.monotonic() + 2))) <= 3


def test_a_job_deleted_between_two_looks_is_told_as_deleted(old: tuple[Kube, Cluster], monkeypatch: pytest.MonkeyPatch):
    kube, cluster = old
    monkeypatch.setattr(client, "WATCH_SECONDS", 1)
    told = cluster.follow("nli", time.monotonic() + 30)
    next(told)
    kube.delete("FineTuneJob", "nli")
    assert list(told) == [None]
