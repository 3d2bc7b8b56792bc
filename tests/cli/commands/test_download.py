"""download against a real S3 server and a folder: whole, checked, resumable, never outside its folder."""

import hashlib
import json
import random
from pathlib import Path

import pytest

from finetune_cli.target_folder import STAGING
from support.cli.run import finetune, no_traceback
from support.simulation import job_states as states

FILES = {
    "adapter_config.json": b'{"r": 16}',
    "adapter_model.safetensors": random.Random(7).randbytes(3_000_000),
    "README.md": b"# An adapter\n",
    "training/metrics.jsonl": b'{"step": 1, "loss": 2.0}\n',
    "training/empty.txt": b"",
}


def manifest_of(files, **changes):
    """manifest.json as a publisher writes it."""
    records = [
        {"path": path, "sizeBytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for path, data in files.items()
    ]
    body = {"schemaVersion": 1, "kind": "Adapter", "createdAt": "2026-01-01T00:00:00Z", "files": records} | changes
    return json.dumps(body).encode()


@pytest.fixture
def adapter(s3, bucket):
    """An adapter on the S3 server; returns its URI."""
    for path, data in (FILES | {"manifest.json": manifest_of(FILES)}).items():
        s3.client().put_object(Bucket=bucket, Key=f"nli/{path}", Body=data)
    return f"s3://{bucket}/nli"


@pytest.fixture
def fetch(s3, tmp_path):
    """Run `finetune download` with the S3 server's keys."""

    def run(uri, folder="out", *options, env=None):
        return no_traceback(finetune("download", uri, folder, *options, env=s3.env | (env or {}), cwd=tmp_path))

    return run


def contents(folder: Path):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_arrives_and_is_checked(fetch, adapter, tmp_path):
    result = fetch(adapter)
    assert result.returncode == 0, result.stderr
    assert "✓ 5 files (2.9 MiB) downloaded to out, all checksums verified\n" in result.stdout
    assert contents(tmp_path / "out") == FILES | {"manifest.json": manifest_of(FILES)}


def test_a_second_download_fetches_nothing(fetch, adapter, s3, bucket):
    fetch(adapter)
    for key in FILES:
        s3.client().delete_object(Bucket=bucket, Key=f"nli/{key}")
    result = fetch(adapter)
    assert result.returncode == 0, result.stderr
    assert "all checksums verified (5 of them were already in out)" in result.stdout


def test_as_data_it_lists_what_is_there_and_what_was_fetched(fetch, adapter, tmp_path):
    fetch(adapter)
    (tmp_path / "out" / "README.md").unlink()
    said = json.loads(fetch(adapter, "out", "-o", "json").stdout)
    assert said["uri"] == adapter
    assert {file["path"]: file["fetched"] for file in said["files"]} == {path: path == "README.md" for path in FILES}


def test_an_interrupted_download_goes_on_where_it_stopped(fetch, adapter, s3, bucket, tmp_path):
    """The store now holds another first half: only a download that keeps its own half can still be right."""
    name, data = "adapter_model.safetensors", FILES["adapter_model.safetensors"]
    half = len(data) // 2
    (tmp_path / "out" / STAGING).mkdir(parents=True)
    part = tmp_path / "out" / STAGING / f"{list(FILES).index(name):05}-{hashlib.sha256(data).hexdigest()}"
    part.write_bytes(data[:half])
    s3.client().put_object(Bucket=bucket, Key=f"nli/{name}", Body=bytes(half) + data[half:])
    result = fetch(adapter)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / name).read_bytes() == data
    assert not part.parent.exists()


def test_damaged_bytes_are_never_taken_for_an_adapter(fetch, adapter, s3, bucket, tmp_path):
    damaged = bytearray(FILES["adapter_model.safetensors"])
    damaged[1234] ^= 1
    s3.client().put_object(Bucket=bucket, Key="nli/adapter_model.safetensors", Body=bytes(damaged))
    result = fetch(adapter)
    assert result.returncode == 5
    assert (
        f"{adapter}/adapter_model.safetensors has SHA-256 {hashlib.sha256(damaged).hexdigest()}, but its manifest"
        in result.stderr
    )
    assert not (tmp_path / "out").exists()


def test_another_adapter_in_the_folder_is_kept_unless_asked(fetch, adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_bytes(manifest_of({"README.md": b"# Another\n"}))
    (tmp_path / "out" / "README.md").write_bytes(b"# Another\n")
    result = fetch(adapter)
    assert result.returncode == 1
    assert "out holds another adapter" in result.stderr
    assert (tmp_path / "out" / "README.md").read_bytes() == b"# Another\n"
    assert fetch(adapter, "out", "--overwrite").returncode == 0
    assert contents(tmp_path / "out") == FILES | {"manifest.json": manifest_of(FILES)}


@pytest.mark.parametrize(
    ("uri", "env", "code", "sentence"),
    [
        (
            "{uri}-gone",
            {},
            1,
            "no complete adapter at {uri}-gone: manifest.json, which is written last, is missing",
        ),
        ("file://adapters/nli", {}, 1, "(file:// takes an absolute path (file:///…)"),
        (f"file://{__file__}", {}, 1, "it is a file, an adapter is a folder"),
        ("s3://no-such-bucket-here/a", {}, 1, "bucket no-such-bucket-here does not exist"),
        (
            "{uri}",
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            3,
            "access denied (SignatureDoesNotMatch): check the keys in the environment",
        ),
        (
            "{uri}",
            {"AWS_ACCESS_KEY_ID": "AKIAWRONG"},
            3,
            "access denied (InvalidAccessKeyId): check the keys in the environment",
        ),
        (
            "{uri}",
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            3,
            "at http://127.0.0.1:9: cannot connect: check the endpoint, DNS and your network",
        ),
        (
            "{uri}",
            {"AWS_ENDPOINT_URL": "nonsense"},
            1,
            "AWS_ENDPOINT_URL must be http://host:port or https://host (in the environment)",
        ),
        ("{uri}", {"AWS_PROFILE": "nobody"}, 3, "no credentials"),
        ("pvc://claim/nli", {}, 1, "is a volume in the cluster, which cannot be read from here"),
        ("s3://user:wrong@bucket/a", {}, 1, "must not hold credentials"),
        ("s3://user:very/wrong@bucket/a", {}, 1, "…@bucket/a: must not hold credentials"),
        ("ftp://host/a", {}, 1, "must be s3://bucket/key"),
    ],
)
def test_what_cannot_be_fetched_is_a_sentence(fetch, adapter, uri, env, code, sentence):
    result = fetch(uri.format(uri=adapter), env=env)
    assert result.returncode == code
    assert sentence.format(uri=adapter) in result.stderr
    assert "wrong" not in result.stderr


def test_what_is_no_adapter_is_refused(fetch, s3, bucket):
    for name, body, sentence in (
        ("broken", b"{", "manifest.json is no manifest of ours"),
        ("checkpoint", manifest_of(FILES, kind="Checkpoint"), "holds a Checkpoint, not an adapter"),
    ):
        s3.client().put_object(Bucket=bucket, Key=f"{name}/manifest.json", Body=body)
        result = fetch(f"s3://{bucket}/{name}")
        assert result.returncode in (1, 5)
        assert sentence in result.stderr


def test_a_folder_can_be_downloaded_too(fetch, tmp_path):
    source = tmp_path / "published"
    for path, data in (FILES | {"manifest.json": manifest_of(FILES)}).items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)
    result = fetch(f"file://{source}")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == contents(source)


def test_a_jobs_adapter_is_found_and_its_digest_compared(ctl, put, adapter, s3, bucket, tmp_path):
    digest = f"sha256:{hashlib.sha256(manifest_of(FILES)).hexdigest()}"
    put(states.job("nli"), states.succeeded(adapter, digest))
    assert ctl("download", "nli", "out", cwd=tmp_path, env=s3.env).returncode == 0
    s3.client().put_object(Bucket=bucket, Key="nli/manifest.json", Body=manifest_of(FILES, rank=8))
    result = ctl("download", "nli", "again", cwd=tmp_path, env=s3.env)
    assert result.returncode == 5
    assert f"{adapter} no longer holds what nli published" in result.stderr
    assert f"finetune download {adapter} again" in result.stderr


def test_a_job_without_an_adapter_has_nothing_to_download(ctl, put, tmp_path):
    put(states.job("busy"), states.training())
    put(states.job("bad"), states.failed("Diverged", "NaN", 91))
    busy, bad = (ctl("download", name, "out", cwd=tmp_path) for name in ("busy", "bad"))
    assert (busy.returncode, bad.returncode) == (1, 2)
    assert "busy has published no adapter (Training)" in busy.stderr
