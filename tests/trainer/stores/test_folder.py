"""A folder or a mounted claim: what is there is whole, and nothing outside is touched."""

from pathlib import Path

import pytest

from finetune_api import constants
from finetune_api.uri import parse
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import (
    BucketNotFound,
    LeadsOutside,
    StoreNotFound,
    StoreUnavailable,
)
from finetune_trainer.stores.open import open_store


def test_a_claim_that_is_not_mounted_is_named(tmp_path: Path) -> None:
    store = open_store(parse("pvc://data/x"), Credentials("output", {}), env={constants.ENV_PVC_ROOT: str(tmp_path)})
    with pytest.raises(BucketNotFound, match=r"claim data is not mounted .* PersistentVolumeClaim"):
        store.list()


def test_a_file_where_a_folder_should_be_is_explained(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("x")
    store = open_store(parse(f"file://{tmp_path}/root"), Credentials("output", {}))
    with pytest.raises(StoreUnavailable, match="File exists"):
        store.write_bytes("x", b"y")


def test_no_empty_folder_is_left_behind_and_a_claim_stays(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    env = {constants.ENV_PVC_ROOT: str(tmp_path)}
    store = open_store(parse("pvc://data/out/checkpoints"), Credentials("output", {}), env=env)
    store.write_bytes("step/x", b"y")
    (tmp_path / "data/out/keep").write_text("mine")
    store.delete("step/x")
    assert [path.name for path in (tmp_path / "data/out").iterdir()] == ["keep"]
    whole = open_store(parse("pvc://data"), Credentials("output", {}), env=env)
    (tmp_path / "data/out/keep").unlink()
    whole.write_bytes("out/x", b"y")
    whole.delete("out/x")
    assert whole.list() == [] and (tmp_path / "data").is_dir()


def test_a_folder_never_shows_files_that_are_still_being_written(tmp_path: Path) -> None:
    store = open_store(parse(f"file://{tmp_path}"), Credentials("output", {}))
    store.write_bytes("whole", b"x")
    (tmp_path / ".model.bin.0123456789abcdef0123456789abcdef.partial").write_bytes(b"half")
    assert [entry.path for entry in store.list()] == ["whole"]


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_folder_is_not_left(tmp_path: Path, path: str) -> None:
    store = open_store(parse(f"file://{tmp_path}/root"), Credentials("output", {}))
    with pytest.raises(StoreNotFound, match="leads out of"):
        store.write_bytes(path, b"x")


@pytest.fixture
def linked(tmp_path: Path) -> tuple[Store, Path]:
    """A claim's store, and a folder outside the claim to which `out` and `file` of the claim lead."""
    outside, root = tmp_path / "outside", tmp_path / "claims" / "data" / "root"
    for folder in (outside, root):
        folder.mkdir(parents=True)
    (outside / "secret").write_text("CANARY")
    (root / "out").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    env = {constants.ENV_PVC_ROOT: str(tmp_path / "claims")}
    return open_store(parse("pvc://data/root"), Credentials("output", {}), env=env), outside


def test_links_out_of_a_claim_are_neither_read_nor_written(linked: tuple[Store, Path], tmp_path: Path) -> None:
    store, outside = linked
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for path in ("file", "out/secret"):
        for touch in (
            lambda path=path: store.exists(path),
            lambda path=path: store.size(path),
            lambda path=path: store.read_bytes(path),
            lambda path=path: list(store.stream(path)),
            lambda path=path: store.digest(path),
            lambda path=path: store.download(path, tmp_path / "copy"),
            lambda path=path: store.write_bytes(path, b"x"),
            lambda path=path: store.write_bytes(path, b"x", if_none_match=True),
            lambda path=path: store.upload(mine, path),
            lambda path=path: store.delete(path),
        ):
            with pytest.raises(
                LeadsOutside, match=r"output\.uri: pvc://data/root: .* leads out of .*/claims/data, thr"
            ):
                touch()
    with pytest.raises(LeadsOutside):
        store.list("out")
    with pytest.raises(LeadsOutside):
        store.upload(mine, "out/new/file")
    assert store.list() == []
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_text() == "CANARY"
    assert not (tmp_path / "copy").exists()
