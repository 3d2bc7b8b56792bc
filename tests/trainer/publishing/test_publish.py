"""Publishing is atomic for readers, idempotent for the same job, and closed to others."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from finetune_api import constants
from finetune_api.spec import Metadata
from finetune_api.status import Adapter
from finetune_api.uri import parse
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.digest import Digest
from finetune_trainer.stores.errors import AlreadyExists, BucketNotFound, StoreAccessDenied
from finetune_trainer.stores.open import open_store
from support.stores.s3 import S3Server

JOB = Metadata(name="nli", namespace="team", uid="1111")
OTHER = Metadata(name="other", namespace="team", uid="2222")


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store(parse(f"file://{tmp_path}/out"), Credentials("output", {}))
    s3: S3Server = request.getfixturevalue("s3")
    bucket = request.getfixturevalue("bucket")
    return open_store(parse(f"s3://{bucket}/out/nli"), Credentials("output", s3.env))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", "one")


def make_adapter(folder: Path, text: str) -> Path:
    (folder / "training").mkdir(parents=True)
    (folder / constants.ADAPTER_CONFIG_FILE).write_text(json.dumps({"text": text}))
    (folder / constants.ADAPTER_WEIGHTS_FILE).write_bytes(text.encode() * 1000)
    (folder / "training" / f"{text}.txt").write_text(text)
    return folder


def find(store: Store, job: Metadata = JOB, overwrite: bool = False) -> Adapter | None:
    return AdapterOutput(store, job, overwrite).find_published()


def put(store: Store, folder: Path, job: Metadata = JOB, overwrite: bool = False) -> Adapter:
    return AdapterOutput(store, job, overwrite).publish(bundle(folder))


def bundle(folder: Path) -> Bundle:
    return Bundle(folder, ARTIFACTS["Adapter"], base_model="org/base", rank=8, metrics={"evalLoss": 0.5})


def test_the_manifest_names_every_file_with_its_digest(store: Store, adapter: Path) -> None:
    result = put(store, adapter)
    data = store.read_bytes(constants.MANIFEST_FILE)
    manifest = json.loads(data)
    assert result.manifest_digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert {file["path"] for file in manifest["files"]} == {
        "adapter_config.json", "adapter_model.safetensors", "training/one.txt"
    }  # fmt: skip
    for file in manifest["files"]:
        stored = store.read_bytes(file["path"])
        assert (len(stored), hashlib.sha256(stored).hexdigest()) == (file["sizeBytes"], file["sha256"])
    assert manifest["job"] == {"namespace": "team", "name": "nli", "uid": "1111"}


def test_what_does_not_load_gets_no_manifest(store: Store, adapter: Path) -> None:
    def load_back(output: AdapterOutput, digests: Mapping[str, Digest]) -> None:
        assert output.store is store
        assert digests.keys() == {entry.path for entry in store.list()}, "all is there when it is loaded"
        raise RuntimeError("it does not load")

    with pytest.raises(RuntimeError, match="does not load"):
        AdapterOutput(store, JOB).publish(bundle(adapter), before_manifest=load_back)
    assert not store.exists(constants.MANIFEST_FILE)
    assert find(store) is None


def test_another_jobs_adapter_is_never_touched(store: Store, adapter: Path, tmp_path: Path) -> None:
    put(store, adapter, OTHER)
    before = store.read_bytes(constants.MANIFEST_FILE)
    with pytest.raises(AlreadyExists, match="already holds an adapter \\(of team/other"):
        find(store)
    with pytest.raises(AlreadyExists):
        put(store, make_adapter(tmp_path / "mine", "two"))
    assert store.read_bytes(constants.MANIFEST_FILE) == before
    assert store.exists("training/one.txt")


def test_checking_the_target_finds_trouble_before_the_training(s3: S3Server, bucket: str) -> None:
    reader = s3.add_user({"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetObject"], "Resource": "*"})
    for env, uri, error in (
        (s3.env, "s3://no-such-bucket/x", BucketNotFound),
        (s3.env | reader.env, f"s3://{bucket}/x", StoreAccessDenied),
        (s3.env | {"AWS_SECRET_ACCESS_KEY": "wrong"}, f"s3://{bucket}/x", StoreAccessDenied),
    ):
        with pytest.raises(error, match=r"output\.uri"):
            find(open_store(parse(uri), Credentials("output", env)))


def test_checking_an_empty_target_leaves_nothing_behind(store: Store) -> None:
    assert find(store) is None
    assert store.list() == []


def test_a_retry_finds_its_own_adapter_and_keeps_it(store: Store, adapter: Path, tmp_path: Path) -> None:
    first = put(store, adapter)
    assert find(store) == first
    assert put(store, make_adapter(tmp_path / "again", "two")) == first
    assert store.exists("training/one.txt") and not store.exists("training/two.txt")


def test_a_run_without_a_uid_owns_nothing(store: Store, adapter: Path) -> None:
    local = Metadata(name="local")
    put(store, adapter, local)
    with pytest.raises(AlreadyExists, match=r"\(of local,"):
        find(store, local)


def test_its_own_adapter_is_published_again_when_it_is_broken(store: Store, adapter: Path) -> None:
    put(store, adapter)
    store.write_bytes(constants.ADAPTER_WEIGHTS_FILE, b"damaged")
    assert find(store) is None
    put(store, adapter)
    assert store.read_bytes(constants.ADAPTER_WEIGHTS_FILE) == (adapter / constants.ADAPTER_WEIGHTS_FILE).read_bytes()
    assert find(store) is not None


def test_overwriting_replaces_everything_and_only_what_was_published(
    store: Store, adapter: Path, tmp_path: Path
) -> None:
    put(store, adapter, OTHER)
    store.write_bytes("notes.txt", b"a person's own")
    store.write_bytes("checkpoints/step-00000001/manifest.json", b"{}")
    new = make_adapter(tmp_path / "new", "two")
    with capture_logs() as said:
        assert find(store, overwrite=True) is None
    [line] = [each["event"] for each in said if each["event"].startswith("Replacing")]
    assert f"Replacing the adapter of {datetime.now(UTC):%Y-%m-%d} " in line and "output.overwrite is true" in line
    put(store, new, overwrite=True)
    assert {entry.path for entry in store.list()} == {
        "adapter_config.json", "adapter_model.safetensors", "training/two.txt", "manifest.json",
        "notes.txt", "checkpoints/step-00000001/manifest.json",
    }  # fmt: skip
    assert store.read_bytes(constants.ADAPTER_WEIGHTS_FILE) == b"two" * 1000


def test_a_foreign_manifest_is_only_overwritten_when_told_to(store: Store, adapter: Path) -> None:
    store.write_bytes(constants.MANIFEST_FILE, b'{"name": "a browser extension"}')
    with pytest.raises(AlreadyExists, match=r"no manifest of ours: .*output\.overwrite"):
        find(store)
    with pytest.raises(AlreadyExists):
        put(store, adapter)
    assert find(store, overwrite=True) is None
    put(store, adapter, overwrite=True)
    assert find(store) is not None


def test_a_job_that_publishes_meanwhile_wins(store: Store, adapter: Path, tmp_path: Path, monkeypatch) -> None:
    """The other one gets its manifest in after our second file."""
    rival = make_adapter(tmp_path / "rival", "two")
    ours = type(store).upload
    sent: list[str] = []

    def upload_then_rival(self: Store, local: Path, path: str, **options: Any) -> None:
        ours(self, local, path, **options)
        if local.is_relative_to(adapter):
            sent.append(path)
            if len(sent) == 2:
                put(store, rival, OTHER)

    monkeypatch.setattr(type(store), "upload", upload_then_rival)
    with pytest.raises(AlreadyExists, match="of team/other"):
        put(store, adapter)
    assert len(sent) == 2
    assert find(store, OTHER) is not None, "the other's adapter is whole"


@pytest.mark.parametrize("missing", [constants.ADAPTER_CONFIG_FILE, constants.ADAPTER_WEIGHTS_FILE])
def test_a_folder_without_an_adapter_is_not_published(store: Store, adapter: Path, missing: str) -> None:
    (adapter / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        put(store, adapter)
    assert store.list() == []


def test_an_adapter_without_our_manifest_is_not_replaced_unasked(store: Store, adapter: Path) -> None:
    """Another tool's; the files of an upload of ours that was cut short are no such thing."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        store.write_bytes(name, b"another tool's")
    with pytest.raises(AlreadyExists, match=r"already holds an adapter, with no manifest of ours: .* output.overwrite"):
        find(store)
    assert find(store, overwrite=True) is None
    store.write_bytes("training/job.yaml", b"of an attempt before")
    assert find(store) is None
