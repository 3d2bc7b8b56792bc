"""Whole runs on remote input: a gated hub model, sharded data sets, S3 with mounted keys; wrong keys and no server."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.exit_codes import ExitCode
from support.stores.hub import Hub
from support.stores.s3 import Keys, S3Server
from support.trainer.process import TrainerProcess, job, train
from support.trainer.tiny_model import nli_rows, write_jsonl

TOKEN = "hf_0123456789"
SHORT: dict[str, Any] = {
    "training.maxSteps": 2,
    "evaluation.onStart": False,
    "evaluation.everySteps": 2,
    "dataset.eval": None,
}


def _secret(folder: Path, role: str, **values: str) -> None:
    (folder / "secrets" / role).mkdir(parents=True, exist_ok=True)
    for key, value in values.items():
        (folder / "secrets" / role / key).write_text(value)


def test_a_gated_hub_model_and_data_set_by_token_and_revision(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "train-0.jsonl", nli_rows(20))
    write_jsonl(data / "train-1.jsonl", nli_rows(20, seed=1))
    (data / "README.md").write_text("not a shard")
    hub.add("org/base", tiny_model, token=TOKEN, gated=True, revisions=("main", "v1"))
    hub.add("datasets/org/nli", data)
    changes = SHORT | {
        "model": {"source": "hf://org/base", "revision": "v1"},
        "dataset": {"train": "hf://datasets/org/nli"},
    }
    _secret(tmp_path, "model", HF_TOKEN=TOKEN)
    env = {"HF_ENDPOINT": hub.endpoint, "FINETUNE_CACHE_DIR": str(tmp_path / "cache")}
    finished = train(job(tmp_path, tiny_model, changes), tmp_path, env=env)
    assert finished.exit_code == 0, finished.log
    assert "Training rows are text: 40 rows" in finished.log
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["revision"] == hub.repositories["org/base"].commit
    assert finished.report["adapter"]["baseModel"] == "org/base"
    card = (tmp_path / "out/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["datasets"]) == ("org/base", ["org/nli"])
    assert f'"org/base", revision="{config["revision"]}"' in card
    kept = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in [*kept, tmp_path / "trainer.log"] if TOKEN.encode() in path.read_bytes()]


def test_a_branch_that_moves_between_attempts_does_not_end_the_run(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    """The job keeps to the commit it began with; another job takes the new one."""
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    (moved / "README.md").write_text("now with a comma")
    hub.add("org/base", tiny_model)
    began_with = hub.repositories["org/base"].commit
    changes = SHORT | {"model.source": "hf://org/base", "training.maxSteps": 40, "checkpoint.everySteps": 1}
    env = {"HF_ENDPOINT": hub.endpoint, "FINETUNE_CACHE_DIR": str(tmp_path / "cache")}
    config = job(tmp_path, tiny_model, changes, uid="1234")
    killed = TrainerProcess(config, tmp_path, env=env)
    killed.wait_for("Checkpoint of step 2 is saved")
    killed.send(signal.SIGKILL)
    killed.finish()
    hub.add("org/base", moved, before=hub.repositories["org/base"])
    finished = train(config, tmp_path, env=env)
    assert finished.exit_code == 0, finished.log
    assert "Resuming from the checkpoint at step" in finished.log
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["revision"] == began_with
    other = job(tmp_path, tiny_model, changes | {"output.uri": f"file://{tmp_path}/other"}, uid="5678")
    assert train(other, tmp_path, env=env).exit_code == 0
    config_of_other = json.loads((tmp_path / "other/adapter_config.json").read_text())
    assert config_of_other["revision"] == hub.repositories["org/base"].commit != began_with


def test_small_files_come_before_the_weights(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    hub.add("org/base", tiny_model)
    changes = SHORT | {"model.source": "hf://org/base", "dataset.train": f"file://{tmp_path}/bad.jsonl"}
    env = {"HF_ENDPOINT": hub.endpoint, "FINETUNE_CACHE_DIR": str(tmp_path / "cache")}
    finished = train(job(tmp_path, tiny_model, changes), tmp_path, env=env)
    assert finished.exit_code == ExitCode.DATASET_INVALID
    fetched = [path for _, path in hub.requests]
    assert any(path.endswith("config.json") for path in fetched)
    assert not any(path.endswith(".safetensors") for path in fetched)


@pytest.mark.parametrize(
    ("options", "broken", "code", "sentence"),
    [
        ({"token": TOKEN, "gated": True}, False, ExitCode.ACCESS_DENIED, "accept its terms on the hub"),
        ({"token": TOKEN}, False, ExitCode.ACCESS_DENIED, "does not exist, or is private"),
        ({"revisions": ("other",)}, False, ExitCode.CONFIG_INVALID, "has no revision 'main'"),
        ({}, True, ExitCode.UNAVAILABLE, "keeps answering HTTP 503"),
    ],
)
def test_a_hub_that_refuses(
    options: dict[str, Any], broken: bool, code: ExitCode, sentence: str, hub: Hub, tiny_model: Path, tmp_path: Path
) -> None:
    hub.add("org/base", tiny_model, **options)
    hub.broken = broken
    env = {"HF_ENDPOINT": hub.endpoint, "FINETUNE_CACHE_DIR": str(tmp_path / "cache")}
    finished = train(job(tmp_path, tiny_model, SHORT | {"model.source": "hf://org/base"}), tmp_path, env=env)
    assert finished.exit_code == code, finished.log
    assert sentence in finished.message
    assert "org/base" in finished.message


def test_weights_that_can_run_code_are_never_fetched(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add("org/pickled", folder)
    env = {"HF_ENDPOINT": hub.endpoint, "FINETUNE_CACHE_DIR": str(tmp_path / "cache")}
    finished = train(job(tmp_path, tiny_model, SHORT | {"model.source": "hf://org/pickled"}), tmp_path, env=env)
    assert finished.exit_code == ExitCode.CONFIG_INVALID
    assert "hf://org/pickled has no .safetensors weights" in finished.message
    assert not [path for _, path in hub.requests if path.endswith(".bin")]


def _upload(s3: S3Server, bucket: str, folder: Path, prefix: str) -> None:
    client = s3.client()
    for file in folder.rglob("*"):
        if file.is_file():
            client.put_object(Bucket=bucket, Key=f"{prefix}/{file.relative_to(folder)}", Body=file.read_bytes())


def test_everything_in_s3_with_a_key_per_role(s3: S3Server, bucket: str, tiny_model: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(12):
        write_jsonl(shards / f"part-{number:02}.jsonl", nli_rows(3, seed=number))
    _upload(s3, bucket, tiny_model, "models/tiny")
    _upload(s3, bucket, shards, "data")
    for role in ("model", "dataset", "output"):
        _secret(tmp_path, role, **s3.keys.env)
    changes = SHORT | {
        "model.source": f"s3://{bucket}/models/tiny",
        "dataset.train": f"s3://{bucket}/data/",
        "output.uri": f"s3://{bucket}/adapters/nli",
    }
    config = job(tmp_path, tiny_model, changes)
    env = s3.settings | {"FINETUNE_CACHE_DIR": str(tmp_path / "cache")}
    finished = train(config, tmp_path, env=env)
    assert finished.exit_code == 0, finished.log
    assert "Training rows are text: 36 rows" in finished.log
    keys = [item["Key"] for item in s3.client().list_objects_v2(Bucket=bucket, Prefix="adapters/")["Contents"]]
    assert "adapters/nli/manifest.json" in keys
    assert not [key for key in keys if "checkpoints" in key]
    adapter = s3.client().get_object(Bucket=bucket, Key="adapters/nli/adapter_config.json")["Body"].read()
    assert json.loads(adapter)["base_model_name_or_path"] == f"s3://{bucket}/models/tiny"
    texts = [finished.log, json.dumps(finished.report)]
    assert not [text for text in texts if s3.keys.secret in text or s3.keys.access in text]


def test_wrong_keys_are_access_denied_before_weights_load(
    s3: S3Server, bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    _secret(tmp_path, "output", **Keys("AKIAWRONG", "wrong").env)
    config = job(tmp_path, tiny_model, SHORT | {"output.uri": f"s3://{bucket}/x"})
    finished = train(config, tmp_path, env=s3.settings)
    assert finished.exit_code == ExitCode.ACCESS_DENIED, finished.log
    assert f"output.uri: s3://{bucket}/x" in finished.message
    assert "LoadingModel" not in finished.log
    assert "AKIAWRONG" not in finished.log + json.dumps(finished.report)


@pytest.mark.parametrize("field", ["dataset.train", "output.uri"])
def test_a_missing_bucket_names_its_field(field: str, s3: S3Server, tiny_model: Path, tmp_path: Path) -> None:
    config = job(tmp_path, tiny_model, SHORT | {field: "s3://no-such-bucket-here/x/"})
    finished = train(config, tmp_path, env=s3.env)
    assert finished.exit_code == ExitCode.CONFIG_INVALID, finished.log
    assert field in finished.message
    assert "no-such-bucket-here" in finished.message


def test_an_earlier_adapter_in_s3_is_continued(s3: S3Server, bucket: str, tiny_model: Path, tmp_path: Path) -> None:
    first = train(
        job(tmp_path / "a", tiny_model, SHORT | {"output.uri": f"s3://{bucket}/a"}), tmp_path / "a", env=s3.env
    )
    assert first.exit_code == 0, first.log
    changes = SHORT | {"output.uri": f"s3://{bucket}/b", "lora.initFrom": f"s3://{bucket}/a"}
    second = train(job(tmp_path / "b", tiny_model, changes), tmp_path / "b", env=s3.env)
    assert second.exit_code == 0, second.log
    assert second.report["metrics"]["trainLoss"] < first.report["metrics"]["trainLoss"]
