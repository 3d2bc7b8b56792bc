"""promote and rollback move the pointer of a prefix in one step; nobody gets what was not promoted."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from finetune_api.latest import MAX_HISTORY, Latest, Promotion
from finetune_api.uri import parse
from finetune_cli import promotion
from finetune_cli.errors import CliError
from finetune_cli.promotion import default_prefix
from finetune_trainer.stores import latest
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import AlreadyExists, StoreError, StoreMisconfigured
from finetune_trainer.stores.open import open_store
from finetune_trainer.stores.s3.store import S3Store
from support.cli.run import finetune, no_traceback
from support.stores.s3 import S3Server


class Prefix:
    """A prefix in S3 or in a folder."""

    def __init__(self, uri: str, env: dict[str, str]) -> None:
        self.uri, self.env = uri, env
        self.store = open_store(parse(uri), Credentials("output", env))

    def put(self, path: str, text: str = "one") -> str:
        """Publish an adapter; returns its manifest's digest."""
        files = {"adapter_config.json": text.encode(), "adapter_model.safetensors": b"weights"}
        records = [
            {"path": name, "sizeBytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        ]
        manifest = {"schemaVersion": 1, "kind": "Adapter", "createdAt": "2026-01-01T00:00:00Z", "files": records}
        for name, data in (files | {"manifest.json": json.dumps(manifest).encode()}).items():
            self.store.write_bytes(f"{path}/{name}", data)
        return f"sha256:{hashlib.sha256(json.dumps(manifest).encode()).hexdigest()}"

    def run(self, *arguments: str) -> Any:
        return no_traceback(finetune(*arguments, env=self.env))

    @property
    def current(self) -> str:
        return json.loads(self.store.read_bytes("latest.json"))["current"]["path"]


@pytest.fixture
def prefix(tmp_path: Path) -> Prefix:
    (tmp_path / "nli").mkdir()
    return Prefix(f"file://{tmp_path}/nli", {})


@pytest.fixture(params=["s3", "file"])
def anywhere(request: pytest.FixtureRequest, prefix: Prefix) -> Prefix:
    if request.param == "file":
        return prefix
    s3, bucket = request.getfixturevalue("s3"), request.getfixturevalue("bucket")
    return Prefix(f"s3://{bucket}/nli", s3.env)


def pointer(path: str, digest: str) -> Latest:
    at = "2026-01-01T00:00:00Z"
    return Latest(current=Promotion.model_validate({"path": path, "manifestDigest": digest, "promotedAt": at}))


def test_readers_of_the_prefix_get_what_is_promoted_and_rolled_back(prefix: Prefix, tmp_path: Path) -> None:
    digests = {path: prefix.put(path, path) for path in ("one", "two", "run/candidates/nli-0f3c9a77")}
    for path in digests:
        done = prefix.run("promote", f"{prefix.uri}/{path}", "--prefix", prefix.uri)
        assert (done.returncode, prefix.current) == (0, path), done.stderr
        assert f"✓ {prefix.uri}/latest.json names {path} ({digests[path]})" in done.stdout
    again = prefix.run("promote", f"{prefix.uri}/{path}", "--prefix", prefix.uri, "-o", "json")
    assert [each["path"] for each in json.loads(again.stdout)["history"]] == ["two", "one"]
    listed = prefix.run("rollback", prefix.uri, "--list")
    assert (prefix.current, listed.returncode) == (path, 0)
    assert "before" in listed.stdout + listed.stderr
    for path in ("two", "one"):
        assert prefix.run("rollback", prefix.uri).returncode == 0
        assert prefix.current == path
        fetched = prefix.run("download", prefix.uri, str(tmp_path / f"got-{path}"))
        assert fetched.returncode == 0, fetched.stderr
        assert (tmp_path / f"got-{path}/adapter_config.json").read_text() == path
    last = prefix.run("rollback", prefix.uri)
    assert (last.returncode, prefix.current) == (1, "one")
    assert "back to: one is the first in its history" in last.stderr.replace("\n", " ")
    assert f"finetune promote {prefix.uri}/ADAPTER" in last.stderr.replace("\n", " ")


def test_somebody_elses_move_is_never_undone(anywhere: Prefix) -> None:
    store = anywhere.store
    first, second = (pointer(path, anywhere.put(path, path)) for path in ("one", "two"))
    latest.move(store, first, None)
    before = first.to_bytes()
    latest.move(store, second, before)
    with pytest.raises(AlreadyExists, match="changed by somebody else meanwhile"):
        latest.move(store, pointer("three", f"sha256:{'0' * 64}"), before)
    with pytest.raises(AlreadyExists):
        latest.move(store, first, None)
    assert anywhere.current == "two"
    latest.move(store, second, before)  # our own try, whose answer was lost
    found = latest.find(store)
    assert found is not None
    assert found.path == "two"


def test_two_moves_in_one_instant_end_in_one(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = Prefix(f"s3://{bucket}/nli", s3.env)
    first, second, third = (pointer(path, f"sha256:{'0' * 64}") for path in ("one", "two", "three"))
    latest.move(prefix.store, first, None)
    put = S3Store._put

    def after_another(store: S3Store, *arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(S3Store, "_put", put)
        latest.move(Prefix(prefix.uri, s3.env).store, second, first.to_bytes())
        put(store, *arguments, **options)

    monkeypatch.setattr(S3Store, "_put", after_another)
    with pytest.raises(AlreadyExists, match="changed by somebody else meanwhile"):
        latest.move(prefix.store, third, first.to_bytes())
    assert prefix.current == "two"


@pytest.mark.parametrize("status", [200, 412])
def test_a_move_whose_answer_was_lost_on_the_way_is_our_own(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """What lies between may send a request again: the second one then finds another ETag, that of the first."""
    store = Prefix(f"s3://{bucket}/nli", s3.env).store
    first, second = (pointer(path, f"sha256:{'0' * 64}") for path in ("one", "two"))
    latest.move(store, first, None)
    put = S3Store._put

    def twice(one: S3Store, *arguments: Any, **options: Any) -> None:
        put(one, *arguments, **options)
        if status == 412:
            put(one, *arguments, **options)

    monkeypatch.setattr(S3Store, "_put", twice)
    latest.move(store, second, first.to_bytes())
    assert store.read_bytes("latest.json") == second.to_bytes()


def test_a_store_that_refuses_its_own_etag_is_named_and_nobody_is_blamed(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Prefix(f"s3://{bucket}/nli", s3.env).store
    first, second = (pointer(path, f"sha256:{'0' * 64}") for path in ("one", "two"))
    latest.move(store, first, None)
    put = S3Store._put

    def with_weak_etags(one: S3Store, *arguments: Any, **options: Any) -> None:
        put(one, *arguments, **{key: f"W/{value}" if key == "IfMatch" else value for key, value in options.items()})

    monkeypatch.setattr(S3Store, "_put", with_weak_etags)
    with pytest.raises(StoreMisconfigured, match="refused with the ETag that it has itself"):
        latest.move(store, second, first.to_bytes())


def test_a_store_that_ignores_conditions_is_told_and_leaves_no_trace(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Prefix(f"s3://{bucket}/nli", s3.env).store
    moves = [pointer(path, f"sha256:{'0' * 64}") for path in ("one", "two", "three")]
    assert promotion.move(store, moves[0], None) == promotion.move(store, moves[1], moves[0].to_bytes()) == ""
    put = S3Store._put
    monkeypatch.setattr(S3Store, "_put", lambda one, path, body, digest, **condition: put(one, path, body, digest))
    told = promotion.move(store, moves[2], moves[1].to_bytes())
    assert "ignores If-Match: if somebody else moves this pointer" in told
    assert [entry.path for entry in store.list()] == ["latest.json"]


def test_keys_that_may_write_the_pointer_alone_move_it(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Prefix(f"s3://{bucket}/nli", s3.env).store
    put = S3Store._put

    def denied(one: S3Store, path: str, *arguments: Any, **condition: str) -> None:
        if path != "latest.json":
            answer = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
            raise ClientError(answer, "PutObject")  # type: ignore[arg-type]
        put(one, path, *arguments, **condition)

    monkeypatch.setattr(S3Store, "_put", denied)
    assert promotion.move(store, pointer("one", f"sha256:{'0' * 64}"), None) == ""


def test_a_store_that_knows_no_conditions_takes_the_pointer_without(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Prefix(f"s3://{bucket}/nli", s3.env).store
    first, second = (pointer(path, f"sha256:{'0' * 64}") for path in ("one", "two"))
    put, tries = S3Store._put, []

    def refused(one: S3Store, path: str, body: Any, digest: Any, **condition: str) -> None:
        tries.append(condition)
        if condition:
            answer = {"Error": {"Code": "NotImplemented"}, "ResponseMetadata": {"HTTPStatusCode": 501}}
            raise ClientError(answer, "PutObject")  # type: ignore[arg-type]
        put(one, path, body, digest)

    monkeypatch.setattr(S3Store, "_put", refused)
    assert "ignores If-Match" in promotion.move(store, first, None)
    assert "ignores If-Match" in promotion.move(store, second, first.to_bytes())
    assert (store.read_bytes("latest.json"), len(tries)) == (second.to_bytes(), 6)
    for before in (first.to_bytes(), None):
        with pytest.raises(CliError, match="somebody else moved the pointer"):
            promotion.move(store, first, before)


def test_what_is_damaged_or_replaced_is_not_promoted_and_not_rolled_back_to(prefix: Prefix) -> None:
    prefix.put("one"), prefix.put("two", "two")
    for path in ("one", "two"):
        assert prefix.run("promote", f"{prefix.uri}/{path}").returncode == 0
    prefix.put("one", "another")
    replaced = prefix.run("rollback", prefix.uri)
    assert (replaced.returncode, prefix.current) == (5, "two")
    assert "no longer holds the adapter that was promoted" in replaced.stderr
    prefix.put("bad")
    prefix.store.write_bytes("bad/adapter_model.safetensors", b"changed")
    damaged = prefix.run("promote", f"{prefix.uri}/bad")
    assert (damaged.returncode, prefix.current) == (5, "two")
    prefix.put("two", "forged")
    fetched = prefix.run("download", prefix.uri, str(Path(os.devnull)))
    assert fetched.returncode == 5
    assert "names two, whose manifest is sha256:" in fetched.stderr


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("../other", "has an empty, '.' or '..' part"),
        ("/etc", "is empty, absolute"),
        ("", "is empty, absolute"),
        (".", "has an empty, '.' or '..' part"),
        ("a/../../b", "has an empty, '.' or '..' part"),
        ("a\\b", "holds a backslash"),
        ("c:/x", "begins with a drive letter"),
        (".hidden/one", "begins with a dot"),
        ("one\x1b[2J", "control or invisible characters"),
        ("loop", "names loop, which holds no adapter of its own"),
        ("nothing", "names nothing, which holds no adapter of its own"),
    ],
)
def test_a_hostile_pointer_is_refused(prefix: Prefix, tmp_path: Path, path: str, sentence: str) -> None:
    text = pointer("one", f"sha256:{'0' * 64}").manifest()
    text["current"]["path"] = path
    for folder in ("", "loop/"):  # a pointer never leads to another one
        prefix.store.write_bytes(f"{folder}latest.json", json.dumps(text).encode())
    found = prefix.run("download", prefix.uri, str(tmp_path / "out"))
    assert found.returncode == 5, found.stdout
    assert sentence in found.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"schemaVersion": 2}', '{"current": null}'])
def test_a_pointer_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "latest.json").write_text(text)
    with pytest.raises(StoreError, match="is no pointer of ours"):
        latest.read(Prefix(f"file://{tmp_path}", {}).store)


def test_a_link_does_not_lead_a_pointer_out_of_its_folder(tmp_path: Path) -> None:
    digest = Prefix(f"file://{tmp_path}", {}).put("outside")
    (tmp_path / "nli").mkdir()
    (tmp_path / "nli/one").symlink_to(tmp_path / "outside")
    prefix = Prefix(f"file://{tmp_path}/nli", {})
    prefix.store.write_bytes("latest.json", pointer("one", digest).to_bytes())
    found = prefix.run("download", prefix.uri, str(tmp_path / "out"))
    assert found.returncode == 1
    assert "through a symbolic link" in found.stderr.replace("\n", " ")


def test_what_a_pointer_may_not_name_is_told(tmp_path: Path) -> None:
    prefix = Prefix(f"file://{tmp_path}/nli", {})
    prefix.put("one")
    elsewhere = prefix.run("promote", f"{prefix.uri}/one", "--prefix", f"file://{tmp_path}/other")
    assert "does not lie below" in elsewhere.stderr.replace("\n", " ")
    prefix.put("one/two")
    inside = prefix.run("promote", f"{prefix.uri}/one/two")
    assert "holds an adapter of its own" in inside.stderr.replace("\n", " ")
    assert prefix.run("rollback", prefix.uri).stderr.replace("\n", " ").count("has no latest.json") == 1
    assert (elsewhere.returncode, inside.returncode) == (1, 1)


def test_the_history_is_bounded() -> None:
    moved = pointer("one", f"sha256:{'0' * 64}")
    for number in range(MAX_HISTORY + 10):
        moved = moved.promoted(moved.current.model_copy(update={"path": f"run-{number}"}))
    assert (len(moved.history), moved.history[0].path) == (MAX_HISTORY, f"run-{MAX_HISTORY + 8}")


@pytest.mark.parametrize(
    ("address", "prefix"),
    [
        ("s3://adapters/nli/run-7", "s3://adapters/nli"),
        ("s3://adapters/nli/run-7/", "s3://adapters/nli"),
        ("s3://adapters/nli/run-7/candidates/nli-0f3c", "s3://adapters/nli"),
        ("s3://adapters/nli", "s3://adapters"),
        ("file:///a/b", "file:///a"),
    ],
)
def test_the_prefix_is_the_folder_above(address: str, prefix: str) -> None:
    assert default_prefix(address) == prefix


@pytest.mark.parametrize("address", ["s3://adapters", "s3://adapters/", "s3://a/candidates/nli-0f3c", "file:///a"])
def test_where_nothing_is_above_the_adapter_a_prefix_is_asked_for(address: str) -> None:
    with pytest.raises(CliError, match="no folder is above this adapter") as refusal:
        default_prefix(address)
    assert "--prefix" in (refusal.value.hint or "")
