"""A checkpoint counts only when every byte of it is there; the newest that does is the one to resume from."""

import json
import os
from pathlib import Path

import pytest

from finetune_api.spec import Metadata
from finetune_api.uri import parse
from finetune_trainer.checkpoints import remote
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import StoreCorrupted, StoreNotFound, StoreUnavailable
from finetune_trainer.stores.open import open_store
from support.stores.fault_proxy import Faults, faulty
from support.stores.s3 import S3Server

JOB = Metadata(name="nli", namespace="team", uid="1111")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.stores.s3.retry.OUTAGE_SECONDS", 0.5)


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store(parse(f"file://{tmp_path}/checkpoints"), Credentials("output", {}))
    s3: S3Server = request.getfixturevalue("s3")
    bucket = request.getfixturevalue("bucket")
    return open_store(parse(f"s3://{bucket}/out/checkpoints"), Credentials("output", s3.env))


def make_state(folder: Path, step: int) -> Path:
    (folder / "nested").mkdir(parents=True, exist_ok=True)
    (folder / "adapter.safetensors").write_bytes(os.urandom(50_000))
    (folder / "nested" / "optimizer.pt").write_bytes(os.urandom(80_000))
    (folder / "trainer_state.json").write_text(json.dumps({"step": step}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(store: Store, tmp_path: Path, step: int, keep: int = 10, job: Metadata | None = None) -> dict[str, bytes]:
    folder = make_state(tmp_path / f"state-{step}", step)
    remote.save(folder, store, step, keep, job=job)
    return contents(folder)


def paths(store: Store) -> set[str]:
    return {entry.path for entry in store.list()}


def resume(store: Store, folder: Path) -> int | None:
    """The step of the checkpoint that is now in `folder`; None when there was none."""
    manifest = remote.resume(store, lambda step: folder)
    return manifest.step if manifest else None


def test_what_is_saved_is_restored(store: Store, tmp_path: Path) -> None:
    saved = save(store, tmp_path, 500)
    remote.restore(store, 500, tmp_path / "restored")
    assert contents(tmp_path / "restored") == saved
    assert "step-00000500/manifest.json" in paths(store)


def test_there_is_nothing_to_resume_at_first(store: Store, tmp_path: Path) -> None:
    assert resume(store, tmp_path / "restored") is None
    with pytest.raises(StoreNotFound, match="no whole checkpoint"):
        remote.restore(store, 500, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize("damage", ["changed", "missing", "shorter", "no manifest", "broken manifest", "bad path"])
def test_a_broken_checkpoint_gives_way_to_the_one_before(
    store: Store, tmp_path: Path, damage: str, monkeypatch
) -> None:
    monkeypatch.setattr("finetune_trainer.stores.s3.retry.MAX_TRIES", 1)
    good = save(store, tmp_path, 500)
    save(store, tmp_path, 1000)
    file, manifest = "step-00001000/nested/optimizer.pt", "step-00001000/manifest.json"
    data = store.read_bytes(file)
    match damage:
        case "changed":
            store.write_bytes(file, data[:-1] + bytes([data[-1] ^ 1]))
        case "missing":
            store.delete(file)
        case "shorter":
            store.write_bytes(file, data[:-1])
        case "no manifest":
            store.delete(manifest)
        case "broken manifest":
            store.write_bytes(manifest, store.read_bytes(manifest)[:-20])
        case "bad path":
            text = json.loads(store.read_bytes(manifest))
            text["files"][0]["path"] = "../../escape"
            store.write_bytes(manifest, json.dumps(text).encode())
    assert resume(store, tmp_path / "restored") == 500
    assert contents(tmp_path / "restored") == good


def test_restoring_a_broken_checkpoint_leaves_the_folder_alone(store: Store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("finetune_trainer.stores.s3.retry.MAX_TRIES", 1)
    save(store, tmp_path, 500)
    store.write_bytes("step-00000500/adapter.safetensors", b"other")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "precious").write_text("kept")
    with pytest.raises(StoreCorrupted):
        remote.restore(store, 500, tmp_path / "work")
    assert contents(tmp_path / "work") == {"precious": b"kept"}
    assert not (tmp_path / ".work.partial").exists()


def test_only_the_newest_are_kept(store: Store, tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        save(store, tmp_path, step, keep=2)
    assert {path.split("/")[0] for path in paths(store)} == {"step-00000300", "step-00000400"}


def test_debris_of_interrupted_saves_is_cleared_by_the_next(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 100)
    store.write_bytes("step-00000200/adapter.safetensors", b"half")
    store.write_bytes("step-00000900/adapter.safetensors", b"of a run that died further on")
    save(store, tmp_path, 300, keep=2)
    assert {path.split("/")[0] for path in paths(store)} == {"step-00000100", "step-00000300"}


def test_a_broken_checkpoint_further_on_does_not_push_out_good_ones(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 500)
    save(store, tmp_path, 1000)
    store.write_bytes("step-00001000/adapter.safetensors", b"broken, so the run went on from 500")
    save(store, tmp_path, 600, keep=1)
    assert resume(store, tmp_path / "restored") == 600
    assert {path.split("/")[0] for path in paths(store)} == {"step-00000600"}


def test_other_things_below_the_checkpoints_are_not_touched(store: Store, tmp_path: Path) -> None:
    store.write_bytes("notes/readme.txt", b"mine")
    store.write_bytes("step-final/x", b"mine")
    save(store, tmp_path, 100, keep=1)
    save(store, tmp_path, 200, keep=1)
    assert {"notes/readme.txt", "step-final/x"} <= paths(store)
    remote.delete_all(store)
    assert paths(store) == {"notes/readme.txt", "step-final/x"}


def test_saving_a_step_again_replaces_it(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 500)
    again = save(store, tmp_path, 500)
    remote.restore(store, 500, tmp_path / "restored")
    assert contents(tmp_path / "restored") == again


def test_deleting_leaves_what_another_job_has_there(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 500, job=JOB)
    save(store, tmp_path, 600, job=JOB.model_copy(update={"name": "other"}))
    store.write_bytes("step-00000700/adapter.safetensors", b"half of one")
    remote.delete_all(store, JOB.model_copy(update={"uid": "of the same job, created anew"}))
    assert {path.split("/")[0] for path in paths(store)} == {"step-00000600"}


def test_each_byte_is_read_once(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    save(open_store(parse(f"s3://{bucket}/c"), Credentials("output", s3.env)), tmp_path, 100)
    reads: list[str] = []
    faults = Faults(only=lambda request: request.method != "GET" or bool(reads.append(request.path)))
    with faulty(s3.endpoint, faults) as endpoint:
        store = open_store(parse(f"s3://{bucket}/c"), Credentials("output", s3.env | {"AWS_ENDPOINT_URL": endpoint}))
        assert resume(store, tmp_path / "restored") == 100
    files = [path for path in reads if not path.endswith(bucket)]
    assert len(files) == len(set(files)) == 4, files


def test_pruning_goes_manifest_first_so_an_interruption_leaves_no_whole_looking_rest(
    s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    direct = open_store(parse(f"s3://{bucket}/c"), Credentials("output", s3.env))
    save(direct, tmp_path, 100)
    deletes = Faults(only=lambda request: request.method == "DELETE" and "00000100" in request.path, crash_at=2)
    with faulty(s3.endpoint, deletes) as endpoint:
        save(open_store(parse(f"s3://{bucket}/c"), Credentials("output", s3.env | {"AWS_ENDPOINT_URL": endpoint})),
             tmp_path, 200, keep=1)  # fmt: skip
    assert "step-00000100/manifest.json" not in paths(direct)
    assert "step-00000100/adapter.safetensors" in paths(direct), "the interruption came between the two"
    assert resume(direct, tmp_path / "restored") == 200


def test_a_silent_store_is_never_taken_for_one_without_checkpoints(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    direct = open_store(parse(f"s3://{bucket}/c"), Credentials("output", s3.env))
    save(direct, tmp_path, 100)
    save(direct, tmp_path, 200)
    for crash_at in range(1, 6):
        faults = Faults(crash_at=crash_at)
        with faulty(s3.endpoint, faults) as endpoint:
            store = open_store(
                parse(f"s3://{bucket}/c"), Credentials("output", s3.env | {"AWS_ENDPOINT_URL": endpoint})
            )
            with pytest.raises(StoreUnavailable):
                resume(store, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
