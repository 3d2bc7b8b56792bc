"""Killed at any moment, however often, a run ends as if it had never stopped: the same losses to the last bit.

FINETUNE_TEST_KILLS sets how often in all (default 8, every night 100): half of them at random moments of the stages of
a run in a folder, half at random requests of runs in S3.
"""

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune_api.artifact_manifest import StoreManifest
from support.stores.fault_proxy import Faults, faulty
from support.stores.s3 import S3Server
from support.trainer.process import (
    Finished,
    TrainerProcess,
    job,
    metrics_lines,
    train,
)
from support.trainer.tiny_model import nli_rows, write_jsonl

KILLS = int(os.environ.get("FINETUNE_TEST_KILLS", "8"))
#: Dropout, shuffling, an uneven last batch, evaluations and checkpoints at other steps than log lines.
RUN: dict[str, Any] = {
    "training.maxSteps": None,
    "training.epochs": 2,
    "training.batchSize": 4,
    "training.microBatchSize": 2,
    "lora.dropout": 0.1,
    "evaluation.everySteps": 5,
    "checkpoint.everySteps": 3,
    "logging.everySteps": 2,
}
#: What the log says where each part of a run begins. Reading data ends with bringing a checkpoint here, a step with an
#: evaluation, or with sending a checkpoint, now and then.
MOMENTS = {
    "reading data": "Serving /metrics",
    "restoring": "Evaluation rows are",
    "loading": '"stage": "LoadingModel"',
    "evaluating before": '"stage": "Evaluating"',
    "starting": '"stage": "Training"',
    "training": '"event": "Step ',
    "after a checkpoint": "Checkpoint of step",
    "publishing": '"stage": "Publishing"',
    "verifying": '"stage": "Verifying"',
    "cleaning up": "was loaded back with PEFT",
}


def _job(folder: Path, model: Path, output: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", nli_rows(30))
    write_jsonl(folder / "eval.jsonl", nli_rows(9, seed=5))
    return job(folder, model, RUN | {"output.uri": output}, uid="1234")


def _result(out: Path) -> tuple[list[dict[str, Any]], bytes]:
    return metrics_lines(out), (out / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("unbroken")
    finished = train(_job(folder, tiny_model, f"file://{folder}/out"), folder)
    assert finished.exit_code == 0, finished.log
    return _result(folder / "out")


class _Lives:
    """The attempts of one run; none may fall behind what one before it has saved."""

    def __init__(self) -> None:
        self._saved = 0
        self.published = False

    def add(self, log: str) -> None:
        resumed = _steps(log, r"Resuming from the checkpoint at step (\d+)")
        began = '"event": "Step ' in log or '"stage": "LoadingModel"' in log
        assert not began or max([0, *resumed]) >= self._saved, log
        assert not (self.published and began), "what was published once is not trained again"
        self._saved = max([self._saved, *_steps(log, r"Checkpoint of step (\d+) is saved")])


def _steps(log: str, pattern: str) -> list[int]:
    return [int(step) for step in re.findall(pattern, log)]


def _kill_at(process: TrainerProcess, mark: str, times: int, delay: float) -> Finished:
    """Kill `process` some seconds after the log has `mark` so often, unless it ends before."""
    while process.log.count(mark) < times and not process.has_ended():
        time.sleep(0.002)
    time.sleep(delay)
    process.send(signal.SIGKILL)
    return process.finish()


def test_kill_9_at_random_moments_of_every_stage(unbroken: Any, tiny_model: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    # Spread evenly over the stages, however many there are to be
    moments = [list(MOMENTS)[kill * len(MOMENTS) // (KILLS // 2)] for kill in range(KILLS // 2)]
    draw.shuffle(moments)
    longest, run, lives = 0.3, 0, _Lives()
    killed: list[str] = []
    while moments:
        folder = tmp_path / str(run)
        config = _job(folder, tiny_model, f"file://{folder}/out")
        times = draw.randint(1, 3) if moments[0] == "training" else 1
        ended = _kill_at(TrainerProcess(config, folder), MOMENTS[moments[0]], times, draw.uniform(0, longest))
        lives.add(ended.log)
        if ended.exit_code == -signal.SIGKILL and ended.log.count(MOMENTS[moments[0]]) >= times:
            killed.append(moments.pop(0))
            lives.published = _whole_or_absent(folder / "out")
            longest = 0.3
        else:  # it was too fast, or a resumed run has no such moment: try with the next run
            assert ended.exit_code == 0, ended.log
            assert _result(folder / "out") == unbroken
            run, lives, longest = run + 1, _Lives(), longest / 2
    finished = train(config, folder)
    assert finished.exit_code == 0, finished.log
    lives.add(finished.log)
    assert _result(folder / "out") == unbroken
    assert not list((folder / "out/checkpoints").rglob("manifest.json"))
    assert len(killed) == KILLS // 2


def _whole_or_absent(out: Path) -> bool:
    """Whether the adapter is published; then all of it must be there."""
    import hashlib

    if not (out / "manifest.json").exists():
        return False
    for file in StoreManifest.model_validate_json((out / "manifest.json").read_bytes()).files:
        assert hashlib.sha256((out / file.path).read_bytes()).hexdigest() == file.sha256
    return True


@contextmanager
def _counting(s3: S3Server, folder: Path, config: Path, kill_at: int | None) -> Iterator[tuple[TrainerProcess, Faults]]:
    """A trainer that talks to S3 through a proxy, and dies with its n-th request there."""
    process: list[TrainerProcess] = []
    faults = Faults(crash_at=kill_at, on_crash=lambda: process[0].send(signal.SIGKILL))
    with faulty(s3.endpoint, faults) as endpoint:
        process.append(TrainerProcess(config, folder, env=s3.env | {"AWS_ENDPOINT_URL": endpoint}))
        yield process[0], faults


def test_kill_9_at_random_requests_to_the_store(
    unbroken: Any, s3: S3Server, bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    draw = random.Random(2)
    kills, run, lives, requests = 0, 0, _Lives(), 0
    while True:
        folder = tmp_path / str(run)
        config = _job(folder, tiny_model, f"s3://{bucket}/{run}")
        # The first run is left alone, and tells how many requests there are.
        alone = run == 0 or kills == KILLS - KILLS // 2
        with _counting(s3, folder, config, None if alone else draw.randint(1, requests)) as (process, faults):
            ended = process.finish()
        lives.add(ended.log)
        if ended.exit_code == -signal.SIGKILL:
            kills += 1
            continue
        assert ended.exit_code == 0, ended.log
        assert _published(s3, bucket, str(run), tmp_path) == unbroken
        if alone and run:
            break
        requests = max(requests, faults.requests)
        run, lives = run + 1, _Lives()
    assert kills == KILLS - KILLS // 2


def _published(s3: S3Server, bucket: str, prefix: str, folder: Path) -> Any:
    objects = s3.objects(bucket, f"{prefix}/")
    out = folder / f"published-{prefix}"
    for key, data in objects.items():
        path = out / key.removeprefix(f"{prefix}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert _whole_or_absent(out)
    assert not list(out.glob("checkpoints/**/manifest.json"))
    return _result(out)
