"""The store keeps its promises on every kind: moto with IAM, rclone's S3 server, a folder and a mounted claim."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api import constants
from finetune_api.uri import parse
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.digest import CHUNK_BYTES, digest_bytes, digest_file
from finetune_trainer.stores.errors import (
    AlreadyExists,
    StoreCorrupted,
    StoreNotFound,
)
from finetune_trainer.stores.folder import FolderStore
from finetune_trainer.stores.open import open_store
from finetune_trainer.stores.s3 import client as s3_client
from support.stores.s3 import S3Server, rclone_server, s3_store

BIG = s3_client.MULTIPART_BYTES + s3_client.PART_BYTES + 12345


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone_server(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(params=["moto", "rclone", "file", "pvc"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_kind(request.param, request, tmp_path)


@pytest.fixture(params=["moto", "file", "pvc"])  # rclone's S3 server knows no If-None-Match
def exclusive_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_kind(request.param, request, tmp_path)


def open_kind(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if kind in ("moto", "rclone"):
        server = request.getfixturevalue("s3" if kind == "moto" else "rclone")
        return s3_store(server, server.make_bucket())
    if kind == "file":
        return open_store(parse(f"file://{tmp_path}/root"), Credentials("output", {}))
    (tmp_path / "claim").mkdir()
    env = {constants.ENV_PVC_ROOT: str(tmp_path)}
    return open_store(parse("pvc://claim/root"), Credentials("output", {}), env=env)


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "big.bin"
    path.write_bytes(os.urandom(1 << 20) * (BIG >> 20) + os.urandom(BIG % (1 << 20)))
    return path


def test_what_is_written_is_read(store: Store) -> None:
    store.write_bytes("a/b.txt", b"first")
    store.write_bytes("a/b.txt", b"second")
    assert store.read_bytes("a/b.txt") == b"second"
    assert store.exists("a/b.txt") and not store.exists("a") and not store.exists("a/b")
    assert store.size("a/b.txt") == 6
    assert store.digest("a/b.txt") == digest_bytes(b"second")


def test_a_stream_begins_where_it_is_asked_to(store: Store, tmp_path: Path) -> None:
    data = os.urandom(CHUNK_BYTES + 1000)
    (tmp_path / "file").write_bytes(data)
    store.upload(tmp_path / "file", "weights.bin")
    store.write_bytes("empty", b"")
    for start in (0, 1, CHUNK_BYTES + 999):
        assert b"".join(store.stream("weights.bin", start)) == data[start:]
    assert b"".join(store.stream("empty")) == b""


def test_listing_is_sorted_and_relative_to_the_root(store: Store) -> None:
    for path in ("b", "a/2", "a/1", "ab/3"):
        store.write_bytes(path, path.encode())
    assert [(entry.path, entry.size) for entry in store.list()] == [("a/1", 3), ("a/2", 3), ("ab/3", 4), ("b", 1)]
    assert [entry.path for entry in store.list("a")] == ["a/1", "a/2"]
    assert store.list("nothing") == []


def test_deleting(store: Store) -> None:
    for path in ("keep", "drop/1", "drop/deep/2", "dropped"):
        store.write_bytes(path, b"x")
    store.delete_prefix("drop")
    store.delete("keep")
    store.delete("keep")
    assert [entry.path for entry in store.list()] == ["dropped"]


def test_reading_what_is_not_there_says_so(store: Store, tmp_path: Path) -> None:
    store.write_bytes("other", b"x")
    for read in (
        store.read_bytes,
        store.size,
        store.digest,
        lambda path: list(store.stream(path)),
        lambda path: store.download(path, tmp_path / "x"),
    ):
        with pytest.raises(StoreNotFound, match=r"output\.uri: .*/missing"):
            read("missing")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("size", [0, 1, 100_000, BIG])
def test_a_file_comes_back_the_same_and_progress_adds_up(store: Store, tmp_path: Path, size: int) -> None:
    local = tmp_path / "file.bin"
    local.write_bytes(os.urandom(size))
    sent, received = [], []
    store.upload(local, "weights.bin", sent.append)
    store.download("weights.bin", tmp_path / "new" / "copy.bin", received.append)
    assert digest_file(tmp_path / "new" / "copy.bin") == digest_file(local)
    assert (sum(sent), sum(received)) == (size, size)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy.bin"]


def test_creating_what_is_already_there_is_refused_unless_it_is_the_same(exclusive_store: Store) -> None:
    exclusive_store.write_bytes("manifest.json", b"mine", if_none_match=True)
    exclusive_store.write_bytes("manifest.json", b"mine", if_none_match=True)
    with pytest.raises(AlreadyExists, match=r"manifest\.json"):
        exclusive_store.write_bytes("manifest.json", b"theirs", if_none_match=True)
    assert exclusive_store.read_bytes("manifest.json") == b"mine"


@pytest.mark.parametrize("kind", ["moto", "rclone", "file"])
def test_a_store_tells_whether_it_honors_conditions(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store = open_kind(kind, request, tmp_path)
    store.write_bytes("latest.json", b"one")
    assert store.honors_conditions("latest.json") == (kind != "rclone")
    assert [(entry.path, entry.size) for entry in store.list()] == [("latest.json", 3)]


def test_of_many_writers_that_create_one_wins(exclusive_store: Store) -> None:
    outcomes: list[str] = []

    def create(data: bytes) -> None:
        try:
            exclusive_store.write_bytes("manifest.json", data, if_none_match=True)
            outcomes.append("created")
        except AlreadyExists:
            outcomes.append("refused")

    threads = [threading.Thread(target=create, args=(bytes([65 + number]),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if isinstance(exclusive_store, FolderStore):  # moto checks and writes in two steps
        assert sorted(outcomes) == ["created"] + ["refused"] * 5
    assert len(exclusive_store.read_bytes("manifest.json")) == 1


def test_a_download_with_another_digest_is_refused_and_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("finetune_trainer.stores.s3.retry.MAX_TRIES", 2)
    store.write_bytes("data", b"changed since")
    with pytest.raises(StoreCorrupted, match="SHA-256"):
        store.download("data", tmp_path / "copy", sha256="0" * 64)
    assert list(tmp_path.glob("copy*")) == [] and list(tmp_path.glob(".copy*")) == []
