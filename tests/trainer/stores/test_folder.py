"""A folder or a mounted claim: what is there is whole, and nothing outside is touched."""

from pathlib import Path

import pytest

from finetune_api import constants
from finetune_api.uri import parse
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import (
    BucketNotFound,
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
