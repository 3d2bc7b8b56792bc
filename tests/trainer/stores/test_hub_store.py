"""A model repository as a store, through huggingface_hub's own client; the hub is a small one of ours."""

from pathlib import Path
from typing import Any

import pytest

from finetune_api.uri import parse
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.stores import manifest as store_manifest
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import (
    AlreadyExists,
    StoreAccessDenied,
    StoreError,
    StoreMisconfigured,
    StoreNotFound,
)
from finetune_trainer.stores.hub_store import HubStore
from finetune_trainer.stores.open import open_store
from support.stores.bundles import bundle_of, output
from support.stores.hub import Hub

TOKEN = "hf_may_write_here"
FILES = {
    "README.md": b"---\nlicense: other\n---\n\n# nli\n",
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": bytes(range(256)) * 4000,
    "training/job.yaml": b"spec: {}\n",
    "training/empty.txt": b"",
}


@pytest.fixture(autouse=True)
def writable(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.writer, hub.folder = TOKEN, tmp_path / "repositories"
    monkeypatch.setattr("finetune_trainer.stores.hub_store.ATTEMPTS", 1)


def repository(hub: Hub, token: str = TOKEN) -> HubStore:
    values = {"HF_ENDPOINT": hub.endpoint} | ({"HF_TOKEN": token} if token else {})
    store = open_store(parse("hf://me/nli", ("hf",)), Credentials("hf", values), field="output.hf.uri")
    assert isinstance(store, HubStore)
    return store


def bundle(folder: Path) -> Bundle:
    return bundle_of(folder, FILES)


def test_an_adapter_is_pushed_in_two_commits_and_read_back(hub: Hub, tmp_path: Path) -> None:
    target = output(repository(hub))
    assert target.find_published() is None
    assert hub.repositories["me/nli"].token == TOKEN  # a private repository was made
    assert hub.commits == []

    def before(at: AdapterOutput, digests: Any) -> None:
        name = "adapter_model.safetensors"
        at.store.download(name, tmp_path / "back", sha256=digests[name].sha256)

    made = target.publish(bundle(tmp_path / "adapter"), before)
    assert (tmp_path / "back").read_bytes() == FILES["adapter_model.safetensors"]
    assert hub.commits == [
        ("Adapter, not verified yet", sorted(FILES)),
        ("Adapter, loaded back and verified", ["manifest.json"]),
    ]
    again = repository(hub)
    manifest, data = store_manifest.read(again) or pytest.fail("no manifest")
    store_manifest.verify(again, manifest)
    assert store_manifest.digest_of(data) == made.manifest_digest
    assert b"".join(again.stream("adapter_model.safetensors", 7)) == FILES["adapter_model.safetensors"][7:]
    assert output(again).find_published() == made
    with pytest.raises(AlreadyExists, match=r"output\.hf\.uri: hf://me/nli already holds an adapter \(of nli"):
        output(again, uid="2").find_published()
    replaced = output(again, uid="2", overwrite=True)
    assert replaced.publish(bundle(tmp_path / "adapter")).manifest_digest != made.manifest_digest


def test_what_fails_before_the_manifest_leaves_none(hub: Hub, tmp_path: Path) -> None:
    def refuse(at: AdapterOutput, digests: Any) -> None:
        raise ValueError("computes something else")

    store = repository(hub)
    store.check_writable("x")
    with pytest.raises(ValueError, match="computes something else"):
        output(store).publish(bundle(tmp_path / "adapter"), refuse)
    assert not (hub.repositories["me/nli"].folder / "manifest.json").exists()


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        (
            "",
            r"^output\.hf\.uri: hf://me/nli at http.*: to push needs an HF_TOKEN that may write",
        ),
        (
            "hf_reads_alone",
            r"^output\.hf\.uri: hf://me/nli .*access denied \(HTTP 403\): check HF_TOKEN in the Secret named",
        ),
    ],
)
def test_a_token_that_may_not_write_is_told_before_training(
    token: str, sentence: str, hub: Hub, tmp_path: Path
) -> None:
    hub.add("me/nli", tmp_path / "nli")
    (tmp_path / "nli").mkdir()
    with pytest.raises(StoreAccessDenied, match=sentence) as caught:
        output(repository(hub, token)).find_published()
    assert not token or token not in str(caught.value)


def test_another_hub_needs_the_administrators_word(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_ALLOWED_ENDPOINTS", "https://huggingface.co")
    with pytest.raises(StoreMisconfigured, match=r"HF_ENDPOINT .* is not allowed here"):
        repository(hub)


def test_names_that_lead_out_are_refused(hub: Hub, tmp_path: Path) -> None:
    store = repository(hub)
    store.check_writable("x")
    hub.twist = lambda said: said | {"siblings": [{"rfilename": "../x", "blobId": "a" * 40, "size": 1}]}
    with pytest.raises(StoreError, match="is not safe as the name of a file"):
        store.list()
    hub.twist = lambda said: said
    with pytest.raises(StoreNotFound, match=r"hf://me/nli.* does not exist"):
        store.read_bytes("nowhere.json")
