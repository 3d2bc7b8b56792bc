"""Each scheme has one entry, and one more store is one file."""

from pathlib import Path
from typing import Any

import pytest

from finetune_api import uri as uris
from finetune_api.uri import Uri
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import AlreadyExists, StoreCorrupted, StoreNotFound
from finetune_trainer.stores.fetch import fetch
from finetune_trainer.stores.open import SCHEMES, open_store
from support.docs.markdown import ROOT, blocks


def test_every_scheme_of_the_api_can_be_opened() -> None:
    assert set(SCHEMES) == {*uris.WRITABLE, *uris.PUSHED}
    assert {*SCHEMES, *uris.READABLE} == set(uris.FORMS)


def test_the_documented_store_keeps_the_promises_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [source] = blocks(ROOT / "docs" / "extending" / "store.md", "python")
    module: dict[str, Any] = {}
    exec(compile(source, "memory.py", "exec"), module)
    monkeypatch.setitem(SCHEMES, "mem", lambda uri, credentials, field, env: module["MemoryStore"](uri, field))

    root, credentials = Uri("mem", "jobs", "nli"), Credentials("output", {})
    store: Store = open_store(root, credentials)
    store.write_bytes("b.txt", b"second")
    store.write_bytes("a/1.txt", b"first", if_none_match=True)
    with pytest.raises(AlreadyExists, match=r"^output\.uri: mem://jobs/nli/a/1\.txt is already there$"):
        store.write_bytes("a/1.txt", b"other", if_none_match=True)
    assert [(entry.path, entry.size) for entry in store.list()] == [("a/1.txt", 5), ("b.txt", 6)]
    assert [entry.path for entry in store.list("a")] == ["a/1.txt"]

    folder = fetch(root, credentials, tmp_path / "cache")
    assert (folder / "a" / "1.txt").read_bytes() == b"first"
    store.upload(folder / "b.txt", "c.txt")
    with pytest.raises(StoreCorrupted):
        store.download("c.txt", tmp_path / "c.txt", sha256="0" * 64)
    assert store.digest("c.txt") == store.digest("b.txt")
    store.delete_prefix("a")
    with pytest.raises(StoreNotFound):
        store.read_bytes("a/1.txt")
