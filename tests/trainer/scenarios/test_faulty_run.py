"""Whole runs with everything in S3 and one request in six broken: they end as a run without faults, or say Unavailable.

What is in the store after each attempt is judged directly, behind the proxy's back.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finetune_api import constants
from finetune_api.exit_codes import ExitCode
from finetune_trainer.stores.s3 import retry
from support.stores.fault_proxy import Faults, faulty
from support.stores.s3 import S3Server
from support.trainer.process import (
    TrainerProcess,
    job,
    metrics_lines,
    train,
)

RUN: dict[str, Any] = {"lora.dropout": 0.1, "checkpoint.everySteps": 1, "evaluation.everySteps": 2}
ATTEMPTS = 8


def _hurry() -> None:
    """As many retries as in production, with shorter waits."""
    retry.MAX_WAIT = 0.05


def _put(s3: S3Server, bucket: str, prefix: str, folder: Path) -> str:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        s3.client().put_object(Bucket=bucket, Key=f"{prefix}/{file.relative_to(folder)}", Body=file.read_bytes())
    return f"s3://{bucket}/{prefix}"


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_run_through_faults_publishes_what_a_run_without_them_does(
    seed: int, s3: S3Server, bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    plain = train(job(tmp_path / "plain", tiny_model, RUN), tmp_path / "plain")
    assert plain.exit_code == 0, plain.log
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "eval"):
        (data / f"{name}.jsonl").write_bytes((tmp_path / f"plain/{name}.jsonl").read_bytes())
    root = _put(s3, bucket, "data", data)
    remote = {
        "model.source": _put(s3, bucket, "model", tiny_model),
        "dataset.train": f"{root}/train.jsonl",
        "dataset.eval": f"{root}/eval.jsonl",
        "output.uri": f"s3://{bucket}/out",
    }
    config = job(tmp_path / "run", tiny_model, RUN | remote, uid="1234")
    faults = Faults(seed=seed, rate=1 / 6)
    ends: Counter[int] = Counter()
    # The proxy refuses a manifest that does not match its signed digest, as S3 does with all bodies and moto with none.
    with faulty(s3.endpoint, faults, checks_payload=lambda path: path.endswith("manifest.json")) as endpoint:
        env = s3.env | {"AWS_ENDPOINT_URL": endpoint, constants.ENV_STORE_PATIENCE: "2"}
        env["FINETUNE_CACHE_DIR"] = str(tmp_path / "cache")
        while not ends[0]:
            ended = TrainerProcess(config, tmp_path / "run", env=env, before=_hurry).finish()
            ends[ended.exit_code] += 1
            assert ended.exit_code in (0, ExitCode.UNAVAILABLE), ended.log
            published = _whole_or_absent(s3.objects(bucket, "out/"))
            assert published or ended.exit_code, "success without an adapter"
            assert ends.total() < ATTEMPTS, faults.counts
    out = tmp_path / "published"
    for key, content in s3.objects(bucket, "out/").items():
        path = out / key.removeprefix("out/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert metrics_lines(out) == metrics_lines(tmp_path / "plain/out")
    weights = [folder / "adapter_model.safetensors" for folder in (out, tmp_path / "plain/out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert faults.total >= 30, faults.counts
    assert len(faults.counts) >= 8, faults.counts


def _whole_or_absent(objects: dict[str, bytes]) -> bool:
    """Whether there is an adapter's manifest; then every byte it names must be there."""
    if "out/manifest.json" not in objects:
        return False
    for file in json.loads(objects["out/manifest.json"])["files"]:
        assert hashlib.sha256(objects[f"out/{file['path']}"]).hexdigest() == file["sha256"]
    return True
