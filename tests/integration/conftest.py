"""Fixtures for tests that need a whole cluster."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.installation.installation import Stage, fill_bucket
from support.node.node import ProcessNode
from support.server.client import Kube
from support.server.server import Cluster
from support.stores.s3 import S3Server
from support.trainer.fork_server import ForkServer


@pytest.fixture
def node(every_cluster: Cluster, everywhere: Kube, tmp_path: Path) -> Iterator[ProcessNode]:
    """A process node for that namespace."""
    with ProcessNode(every_cluster, everywhere.namespace, tmp_path) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral of two layers and its tokenizer."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from support.trainer.tiny_model import build_model

    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def filled_bucket(s3: S3Server, tiny_model: Path) -> str:
    """A bucket with that model and some rows."""
    bucket = s3.make_bucket()
    fill_bucket(s3, bucket, tiny_model)
    return bucket


@pytest.fixture(scope="session")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Forks trainers that have their imports behind them."""
    server = ForkServer(tmp_path_factory.mktemp("trainers"))
    yield server
    server.stop()


@pytest.fixture
def stage(
    cluster: Cluster, kube: Kube, s3: S3Server, filled_bucket: str, trainers: ForkServer, tmp_path: Path
) -> Iterator[Stage]:
    """A namespace with a node, and no adapter in the bucket; the operator is for the test to start."""
    for key in s3.objects(filled_bucket, "adapters/"):
        s3.client().delete_object(Bucket=filled_bucket, Key=key)
    with ProcessNode(cluster, kube.namespace, tmp_path, trainers=trainers) as node:
        yield Stage(cluster, kube, node, s3, filled_bucket, tmp_path)
