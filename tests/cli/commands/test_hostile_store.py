"""A store that somebody else fills: a user's files, disk, memory and terminal stay the user's."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest

from finetune_api import artifact_manifest
from finetune_cli.target_folder import STAGING
from support.cli.run import finetune, no_traceback
from support.simulation import job_states as states

WEIGHTS = b"weights"


def record(path, data=WEIGHTS, **changes):
    return {"path": path, "sizeBytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | changes


def manifest_of(*records):
    body = {"kind": "Adapter", "createdAt": "2026-01-01T00:00:00Z", "files": records}
    return json.dumps(body).encode()


@pytest.fixture
def publish(tmp_path):
    """Fill a store, a folder of this machine, with files as its owner pleases; returns its URI."""

    def fill(files, *records):
        store = tmp_path / "store"
        for path, data in (files | {"manifest.json": manifest_of(*records)}).items():
            (store / path).parent.mkdir(parents=True, exist_ok=True)
            (store / path).write_bytes(data)
        return f"file://{store}"

    return fill


@pytest.fixture
def fetch(tmp_path):
    def run(uri, *options):
        return no_traceback(finetune("download", uri, "out", *options, cwd=tmp_path))

    return run


def tree(folder: Path):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("../evil", "has an empty, '.' or '..' part"),
        ("a/../../evil", "has an empty, '.' or '..' part"),
        ("/etc/evil", "has an empty, '.' or '..' part"),
        ("a//evil", "has an empty, '.' or '..' part"),
        ("", "is empty"),
        ("a\\..\\evil", "holds a backslash"),
        ("C:/evil", "begins with a drive letter"),
        ("README.md:evil", "holds a colon"),
        (".bashrc", "has a part that begins with a dot"),
        ("training/.ssh/evil", "has a part that begins with a dot"),
        (f"{STAGING}/00000-evil", "has a part that begins with a dot"),
        ("two\nlines", "holds control or invisible characters"),
        ("evil\x1b]0;title\x07", "holds control or invisible characters"),
        ("evil\u202egpj.exe", "holds control or invisible characters"),
        ("evil\x9b2J", "holds control or invisible characters"),
        ("manifest.json", "is the manifest's own name"),
        ("MANIFEST.json", "is the manifest's own name"),
    ],
)
def test_a_name_that_could_do_harm_is_refused_and_the_rule_is_named(fetch, publish, tmp_path, path, rule):
    result = fetch(publish({}, record(path)))
    assert result.returncode == 5
    assert f"{path!r} is no name for a file of ours: it " in result.stderr
    assert rule in result.stderr
    assert "\x1b" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "rule"),
    [(("a", "a"), "'a' is listed twice"), (("a", "A"), "'A' is listed twice"), (("A", "a/b"), "lies in another file")],
)
def test_no_file_takes_the_place_of_another_that_was_checked(fetch, publish, names, rule):
    result = fetch(publish({}, *map(record, names)))
    assert result.returncode == 5
    assert rule in result.stderr


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize("taken", ["weights", "manifest.json", "training/log.txt"])
def test_a_users_own_file_is_never_replaced(fetch, publish, tmp_path, taken, options):
    uri = publish({"weights": WEIGHTS, "training/log.txt": WEIGHTS}, record("weights"), record("training/log.txt"))
    (tmp_path / "out" / taken).parent.mkdir(parents=True)
    (tmp_path / "out" / taken).write_text("mine")
    result = fetch(uri, *options)
    assert result.returncode == 1
    assert f"out/{taken} is in the way: it is from no earlier download, and is never replaced" in result.stderr
    assert tree(tmp_path / "out") == {taken: b"mine"}


def test_other_files_in_the_folder_are_left_alone(fetch, publish, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert fetch(publish({"weights": WEIGHTS}, record("weights"))).returncode == 0
    assert set(tree(tmp_path / "out")) == {"notes.txt", "weights", "manifest.json"}


@pytest.mark.parametrize("link", ["weights", "manifest.json", "training", STAGING])
def test_nothing_is_written_through_a_link(fetch, publish, tmp_path, link):
    uri = publish({"weights": WEIGHTS, "training/log.txt": WEIGHTS}, record("weights"), record("training/log.txt"))
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / link).symlink_to(home if link in ("training", STAGING) else home / "file")
    result = fetch(uri, "--overwrite")
    assert result.returncode == 1
    assert f"out/{link} is a link: nothing is written through links" in result.stderr
    assert list(home.iterdir()) == []


def test_no_more_is_written_than_the_manifest_says(fetch, publish, tmp_path):
    uri = publish({"weights": bytes(5_000_000)}, record("weights", b"1"))
    result = fetch(uri)
    assert result.returncode == 5
    assert "store/weights has more than the 1 bytes that its manifest says" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_shorter_than_its_manifest_says_is_refused(fetch, publish, tmp_path):
    result = fetch(publish({"weights": WEIGHTS}, record("weights", sizeBytes=8)))
    assert result.returncode == 5
    assert "store/weights has 7 bytes, but its manifest says 8" in result.stderr
    assert not (tmp_path / "out").exists()


def test_one_bad_file_leaves_none_of_the_good_ones(fetch, publish, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    uri = publish({"good": WEIGHTS, "bad": b"changed"}, record("good"), record("bad"))
    result = fetch(uri)
    assert result.returncode == 5
    assert "has SHA-256" in result.stderr
    assert tree(tmp_path / "out") == {"notes.txt": b"mine"}


def test_more_than_the_disk_has_is_refused_before_a_byte_is_fetched(fetch, publish, tmp_path):
    result = fetch(publish({"weights": WEIGHTS}, record("weights", sizeBytes=2**53)))
    assert result.returncode == 1
    assert "the adapter needs 8,388,608.0 GiB" in result.stderr
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_of_a_manifest_no_more_is_read_than_one_can_have(fetch, publish, s3, bucket, tmp_path, where):
    body = b'{"kind": "Adapter", "baseModel": "' + b"a" * (40 << 20) + b'"}'
    if where == "folder":
        uri, env = publish({}), {}
        (tmp_path / "store" / "manifest.json").write_bytes(body)
    else:
        s3.client().put_object(Bucket=bucket, Key="nli/manifest.json", Body=body)
        uri, env = f"s3://{bucket}/nli", s3.env
    finetune("download", uri + "-gone", "out", cwd=tmp_path, env=env)  # what is imported once does not count
    del body
    tracemalloc.start()
    result = no_traceback(finetune("download", uri, "out", cwd=tmp_path, env=env))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.returncode == 5
    assert f"{uri}/manifest.json" in result.stderr
    assert "has more than 4 MiB" in result.stderr
    assert peak < 8 * artifact_manifest.MAX_BYTES


def test_an_interrupted_replacement_still_knows_whose_files_lie_there(publish, fetch, tmp_path):
    """Killed between two renames: the old manifest is set aside, some files are new and some are old."""
    assert fetch(publish({"a": b"old", "b": b"old"}, record("a", b"old"), record("b", b"old"))).returncode == 0
    out = tmp_path / "out"
    (out / STAGING).mkdir()
    (out / "manifest.json").rename(out / STAGING / "manifest.json")
    uri = publish({"a": b"new", "b": b"new"}, record("a", b"new"), record("b", b"new"))
    (out / "a").write_bytes(b"new")
    assert "holds another adapter" in fetch(uri).stderr
    assert fetch(uri, "--overwrite").returncode == 0
    assert tree(out) == {"a": b"new", "b": b"new", "manifest.json": (tmp_path / "store" / "manifest.json").read_bytes()}


@pytest.mark.parametrize(
    ("command", "file", "sentence"),
    [
        ("status", "metrics.jsonl", "no loss curve: {uri}/training/metrics.jsonl is larger than 8 MiB"),
        ("logs", "log.txt", "error: {uri}/training/log.txt is larger than 64 MiB: the rest is not read"),
    ],
)
@pytest.mark.parametrize(
    "content",
    [b"a", pytest.param(b'{"step": 1, "loss": 1.5}\n', marks=pytest.mark.nightly)],
    ids=["one line", "lines"],
)
def test_of_metrics_and_logs_no_more_is_read_than_a_run_leaves(ctl, put, tmp_path, command, file, sentence, content):
    training = tmp_path / "training"
    training.mkdir()
    (training / file).write_bytes(content)
    put(states.job("nli"), states.succeeded(f"file://{tmp_path}"))
    options = ("--tail", "3") if command == "logs" else ()
    ctl(command, "nli", *options)  # what is imported once does not count
    with (training / file).open("wb") as out:
        for _ in range(80):
            out.write(content * ((1 << 20) // len(content) + 1))
    tracemalloc.start()
    result = ctl(command, "nli", *options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sentence.format(uri=f"file://{tmp_path}") in result.stderr
    assert peak < 40 << 20
