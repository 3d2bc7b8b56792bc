"""Sources of every scheme arrive whole, once, and never outside their folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api import constants
from finetune_api.uri import parse
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import (
    BucketNotFound,
    StoreAccessDenied,
    StoreMisconfigured,
    StoreNotFound,
    StoreUnavailable,
)
from finetune_trainer.stores.fetch import fetch
from support.stores.fault_proxy import Faults, Request, faulty
from support.stores.hub import Hub
from support.stores.s3 import S3Server

MODEL = {"config.json": b"{}", "model-1.safetensors": os.urandom(300_000), "nested/tokenizer.json": b"tokens"}


@pytest.fixture
def s3_model(s3: S3Server, bucket: str) -> str:
    for path, data in MODEL.items():
        s3.client().put_object(Bucket=bucket, Key=f"models/mini/{path}", Body=data)
    return f"s3://{bucket}/models/mini"


@pytest.fixture
def folder_model(tmp_path: Path) -> Path:
    folder = tmp_path / "claims" / "models" / "mini"
    for path, data in MODEL.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_prefix_becomes_a_folder(s3: S3Server, s3_model: str, tmp_path: Path) -> None:
    moved: list[int] = []
    folder = fetch(parse(s3_model), Credentials("model", s3.env), tmp_path, moved.append)
    assert folder.name == "mini" and contents(folder) == MODEL
    assert sum(moved) == sum(map(len, MODEL.values()))
    assert contents(fetch(parse(f"{s3_model}/"), Credentials("model", s3.env), tmp_path)) == MODEL


def test_an_object_becomes_a_file(s3: S3Server, s3_model: str, tmp_path: Path) -> None:
    file = fetch(parse(f"{s3_model}/config.json"), Credentials("dataset", s3.env), tmp_path)
    assert file.name == "config.json" and file.read_bytes() == MODEL["config.json"]


def test_ignored_files_stay_behind(s3: S3Server, s3_model: str, tmp_path: Path) -> None:
    folder = fetch(parse(s3_model), Credentials("model", s3.env), tmp_path, ignore=["*.safetensors"])
    assert sorted(contents(folder)) == ["config.json", "nested/tokenizer.json"]


def test_volumes_and_folders_are_used_where_they_are(folder_model: Path, tmp_path: Path) -> None:
    env = {constants.ENV_PVC_ROOT: str(tmp_path / "claims")}
    assert fetch(parse("pvc://models/mini"), Credentials("model", {}), tmp_path / "cache", env=env) == folder_model
    file = folder_model / "config.json"
    assert fetch(parse(f"file://{file}"), Credentials("dataset", {}), tmp_path / "cache") == file
    assert not (tmp_path / "cache").exists()


def test_what_is_missing_is_named(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    credentials = Credentials("dataset", s3.env)
    with pytest.raises(
        StoreNotFound, match=rf"dataset\.train: s3://{bucket}/no/such is neither an object nor a prefix"
    ):
        fetch(parse(f"s3://{bucket}/no/such"), credentials, tmp_path)
    with pytest.raises(BucketNotFound, match="bucket no-such-bucket does not exist"):
        fetch(parse("s3://no-such-bucket/x"), credentials, tmp_path)
    with pytest.raises(StoreNotFound, match=r"dataset\.eval: file:///no/such does not exist"):
        fetch(parse("file:///no/such"), credentials, tmp_path, field="dataset.eval")
    with pytest.raises(BucketNotFound, match="claim data is not mounted"):
        fetch(parse("pvc://data/x"), credentials, tmp_path, env={constants.ENV_PVC_ROOT: str(tmp_path)})


@pytest.mark.parametrize(
    "key", ["../../escape", "a/../../../escape", "/absolute", "a//b", "./dot", "back\\slash", "C:/x"]
)
def test_keys_that_lead_out_of_the_folder_are_refused(s3: S3Server, s3_model: str, key: str, tmp_path: Path) -> None:
    s3.client().put_object(Bucket=parse(s3_model).authority, Key=f"models/mini/{key}", Body=b"evil")
    with pytest.raises(StoreNotFound, match="contains an unsafe object key"):
        fetch(parse(s3_model), Credentials("model", s3.env), tmp_path / "cache")
    assert contents(tmp_path) == {}


def test_a_second_fetch_downloads_nothing_and_a_changed_object_comes_anew(
    s3: S3Server, s3_model: str, tmp_path: Path
) -> None:
    credentials, uri = Credentials("model", s3.env), parse(s3_model)
    first = fetch(uri, credentials, tmp_path)
    moved: list[int] = []
    assert fetch(uri, credentials, tmp_path, moved.append) == first
    assert moved == []
    s3.client().put_object(Bucket=uri.authority, Key="models/mini/config.json", Body=b"[]")
    assert (fetch(uri, credentials, tmp_path) / "config.json").read_bytes() == b"[]"
    assert (first / "config.json").read_bytes() == b"{}", "a job that reads the old one is not disturbed"


_FETCHER = """
import sys
from pathlib import Path
from finetune_api.uri import parse
from finetune_trainer.stores.fetch import fetch
from finetune_trainer.stores.credentials import Credentials
moved = []
folder = fetch(parse(sys.argv[1]), Credentials.for_role("model"), Path(sys.argv[2]), moved.append)
print(sum(moved), folder)
"""


def test_two_jobs_with_one_cache_download_once(s3: S3Server, s3_model: str, tmp_path: Path) -> None:
    env = os.environ | s3.env | {constants.ENV_SECRETS_DIR: "/nonexistent"}
    command = [sys.executable, "-c", _FETCHER, s3_model, str(tmp_path)]
    jobs = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [job.communicate(timeout=120)[0].split(maxsplit=1) for job in jobs]
    assert sorted(int(moved) for moved, _ in answers) == [0, 0, sum(map(len, MODEL.values()))]
    assert len({folder for _, folder in answers}) == 1
    assert contents(Path(answers[0][1].strip())) == MODEL


def test_an_interrupted_fetch_goes_on_where_it_stopped(s3: S3Server, s3_model: str, tmp_path: Path) -> None:
    def is_weights(request: Request) -> bool:
        return "model-1" in request.path and request.method == "GET"

    weights = Faults(rate=1, kinds=("reset",), only=is_weights)
    with faulty(s3.endpoint, weights) as endpoint, pytest.raises(StoreUnavailable):
        env = s3.env | {"AWS_ENDPOINT_URL": endpoint, constants.ENV_STORE_PATIENCE: "0"}
        fetch(parse(s3_model), Credentials("model", env), tmp_path)
    assert list((tmp_path / "s3").glob("*.partial")) and not list((tmp_path / "s3").glob("*/mini/*.safetensors"))
    gets: list[str] = []

    def note(request: Request) -> bool:
        if request.method == "GET" and "mini/" in request.path:
            gets.append(request.path.rpartition("/")[2])
        return False

    with faulty(s3.endpoint, Faults(only=note)) as endpoint:
        folder = fetch(parse(s3_model), Credentials("model", s3.env | {"AWS_ENDPOINT_URL": endpoint}), tmp_path)
    assert gets == ["model-1.safetensors"]
    assert contents(folder) == MODEL
    assert not list((tmp_path / "s3").glob("*.partial"))


def test_a_download_is_on_the_disk_before_its_name_says_so(
    s3: S3Server, s3_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a name without bytes must not pass for a download: sizes survive where contents do not."""
    synced: set[tuple[int, int]] = set()
    early: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def note(handle: int) -> None:
        fsync(handle)
        synced.add(_identity(os.fstat(handle)))

    def check(move):
        def moved(self: Path, target: Path) -> Path:
            inside = [self, *self.rglob("*")] if self.is_dir() else [self]
            early.extend(str(path) for path in inside if _identity(path.stat()) not in synced)
            return move(self, target)

        return moved

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", note)
        patch.setattr(Path, "replace", check(replace))
        patch.setattr(Path, "rename", check(rename))
        folder = fetch(parse(s3_model), Credentials("model", s3.env), tmp_path)
    assert contents(folder) == MODEL
    assert not early
    assert _identity((tmp_path / "s3").stat()) in synced


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def test_a_disk_too_small_is_said_before_the_download(s3: S3Server, s3_model: str, tmp_path: Path) -> None:
    from types import SimpleNamespace

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(StoreUnavailable, match=r"model\.source: .*/mini needs .* GiB, .* has 0\.0 GiB free"),
    ):
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        fetch(parse(s3_model), Credentials("model", s3.env), tmp_path)


def hub_credentials(hub: Hub, **values: str) -> Credentials:
    return Credentials("model", {"HF_ENDPOINT": hub.endpoint} | values)


@pytest.fixture(autouse=True)
def _no_token_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("finetune_trainer.stores.hub.ATTEMPTS", 1)


def test_a_hub_model_becomes_a_folder(hub: Hub, folder_model: Path, tmp_path: Path) -> None:
    hub.add("org/mini", folder_model)
    moved: list[int] = []
    folder = fetch(parse("hf://org/mini"), hub_credentials(hub), tmp_path / "cache", moved.append)
    assert contents(folder) == MODEL
    assert sum(moved) == sum(map(len, MODEL.values()))
    assert folder.is_relative_to(tmp_path / "cache")


def test_part_of_a_hub_repository(hub: Hub, folder_model: Path, tmp_path: Path) -> None:
    hub.add("datasets/org/rows", folder_model)
    credentials = hub_credentials(hub)
    file = fetch(parse("hf://datasets/org/rows/nested/tokenizer.json"), credentials, tmp_path / "cache")
    assert file.read_bytes() == b"tokens"
    assert contents(fetch(parse("hf://datasets/org/rows/nested"), credentials, tmp_path / "cache")) == {
        "tokenizer.json": b"tokens"
    }
    with pytest.raises(StoreNotFound, match=r"org/rows has no 'missing\.json' at main"):
        fetch(parse("hf://datasets/org/rows/missing.json"), credentials, tmp_path / "cache")


def test_a_gated_model_needs_the_roles_token(hub: Hub, folder_model: Path, tmp_path: Path) -> None:
    hub.add("org/mini", folder_model, token="hf_right", gated=True)
    uri, cache = parse("hf://org/mini"), tmp_path / "cache"
    for values, says in (({}, "is gated: .*"), ({"HF_TOKEN": "hf_CANARY"}, "is gated, and the account of the ")):
        with pytest.raises(StoreAccessDenied, match=rf"{says}HF_TOKEN .* Secret named by model\.secretRef") as caught:
            fetch(uri, hub_credentials(hub, **values), cache)
        assert "CANARY" not in str(caught.value)
    assert contents(fetch(uri, hub_credentials(hub, HF_TOKEN="hf_right"), cache)) == MODEL


def test_a_repository_or_revision_that_is_not_there(hub: Hub, folder_model: Path, tmp_path: Path) -> None:
    hub.add("org/mini", folder_model, revisions=("main", "v1"))
    with pytest.raises(StoreAccessDenied, match="does not exist, or is private"):
        fetch(parse("hf://org/nothing"), hub_credentials(hub), tmp_path / "cache")
    with pytest.raises(StoreNotFound, match="does not exist, or the HF_TOKEN"):
        fetch(parse("hf://org/nothing"), hub_credentials(hub, HF_TOKEN="hf_x"), tmp_path / "cache")
    with pytest.raises(StoreNotFound, match="has no revision 'v2'"):
        fetch(parse("hf://org/mini"), hub_credentials(hub), tmp_path / "cache", revision="v2")
    assert contents(fetch(parse("hf://org/mini"), hub_credentials(hub), tmp_path / "cache", revision="v1")) == MODEL


def test_a_hub_that_is_down(hub: Hub, folder_model: Path, tmp_path: Path) -> None:
    hub.add("org/mini", folder_model)
    cached = fetch(parse("hf://org/mini"), hub_credentials(hub), tmp_path / "cache")
    hub.broken = True
    assert fetch(parse("hf://org/mini"), hub_credentials(hub), tmp_path / "cache") == cached, "whole in the cache"
    with pytest.raises(StoreUnavailable, match="the hub keeps answering HTTP 503"):
        fetch(parse("hf://org/mini"), hub_credentials(hub), tmp_path / "other")
    nowhere = Credentials("model", {"HF_ENDPOINT": "http://127.0.0.1:9"})
    with pytest.raises(StoreUnavailable, match="the hub does not answer: check HF_ENDPOINT"):
        fetch(parse("hf://org/mini"), nowhere, tmp_path / "other")


@pytest.mark.parametrize("value", ["hf_CANARY", "http://CANARY x", "http://host:CANARY"])
def test_a_hub_endpoint_that_is_no_url_is_not_shown(value: str, tmp_path: Path) -> None:
    sentence = r"^model\.source: HF_ENDPOINT must be http://host:port or https://host \(in the Secret named by model\."
    with pytest.raises(StoreMisconfigured, match=sentence) as caught:
        fetch(parse("hf://org/mini"), Credentials("model", {"HF_ENDPOINT": value}), tmp_path)
    assert "CANARY" not in str(caught.value)


def test_a_password_in_the_hubs_endpoint_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"hf://org/mini at http://127\.0\.0\.1:9: the hub does not answer"):
        fetch(parse("hf://org/mini"), Credentials("model", {"HF_ENDPOINT": "http://me:CANARY@127.0.0.1:9"}), tmp_path)


def test_two_jobs_fetch_the_same_hub_model_into_one_cache(hub: Hub, folder_model: Path, tmp_path: Path) -> None:
    hub.add("org/mini", folder_model)
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        constants.ENV_SECRETS_DIR: "/nonexistent",
    }
    command = [sys.executable, "-c", _FETCHER, "hf://org/mini", str(tmp_path / "cache")]
    jobs = [subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [job.communicate(timeout=120)[0].split(maxsplit=1) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    folders = {Path(folder.strip()) for _, folder in answers}
    assert len(folders) == 1
    assert contents(folders.pop()) == MODEL
    fetched = [path for method, path in hub.requests if method == "GET" and path.endswith(".safetensors")]
    assert len(fetched) == 1, "the second waited for the first"
