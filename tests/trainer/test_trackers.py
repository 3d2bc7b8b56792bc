"""The same numbers reach Weights & Biases (offline) and MLflow; a tracker's trouble never ends a run."""

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.names import ExitCode
from support.trainer_process import job, metrics_lines, train

KEY = "0123456789abcdef0123456789abcdef01234567"
RUN: dict[str, Any] = {"training.maxSteps": 3, "evaluation.everySteps": 3, "evaluation.onStart": False}
WANDB = {"logging.wandb": {"project": "nli", "name": "first"}}


def test_weights_and_biases_gets_every_number_offline(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "secrets/wandb").mkdir(parents=True)
    (tmp_path / "secrets/wandb/WANDB_API_KEY").write_text(KEY)
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path / "wandb"), "HOME": str(tmp_path)}
    (tmp_path / "wandb").mkdir()
    finished = train(job(tmp_path, tiny_model, RUN | WANDB), tmp_path, env=env)
    assert finished.exit_code == 0, finished.log
    assert "Metrics also go to Weights & Biases" in finished.log
    (record,) = (tmp_path / "wandb").rglob("run-*.wandb")
    kept = _history(record)
    lines = metrics_lines(tmp_path / "out")
    for key in ("loss", "evalLoss"):
        expected = [line[key] for line in lines if key in line]
        assert [values[key] for values in kept if key in values] == pytest.approx(expected)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "secrets" not in path.parts]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def _history(record: Path) -> list[dict[str, float]]:
    """The logged values in a run's file: W&B's protocol buffers in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for data in _log_records(record.read_bytes()):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(data)
        if message.WhichOneof("record_type") == "history":
            items = message.history.item
            found.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def _log_records(content: bytes, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    position, data = header, b""  # the file's own header is as long as a chunk's
    while position + header <= len(content):
        if block - position % block < header:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        data += content[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield data
            data = b""


def test_mlflow_gets_every_number_and_the_settings(tiny_model: Path, tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    try:
        import sqlalchemy  # noqa: F401 (the full mlflow's; its small one writes files)
    except ImportError:
        uri = f"file://{tmp_path}/mlruns"
    else:
        uri = f"sqlite:///{database}"
    env = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_NAME": "nli", "MLFLOW_ALLOW_FILE_STORE": "true"}
    finished = train(job(tmp_path, tiny_model, RUN), tmp_path, env=env)
    assert finished.exit_code == 0, finished.log
    assert "Metrics also go to MLflow" in finished.log
    losses = [line["loss"] for line in metrics_lines(tmp_path / "out") if "loss" in line]
    if database.exists():
        with sqlite3.connect(database) as connection:
            rows = connection.execute("select value from metrics where key = 'loss' order by step").fetchall()
        kept = [row[0] for row in rows]
    else:
        (file,) = (tmp_path / "mlruns").rglob("metrics/loss")
        kept = [float(line.split()[1]) for line in file.read_text().splitlines()]
    assert kept == pytest.approx(losses)


def test_a_tracker_that_cannot_start_is_a_warning(tiny_model: Path, tmp_path: Path) -> None:
    env = {"MLFLOW_TRACKING_URI": "nonsense://x", "HOME": str(tmp_path)}
    finished = train(job(tmp_path, tiny_model, RUN), tmp_path, env=env)
    assert finished.exit_code == 0, finished.log
    assert "MLflow could not be started and is left out" in finished.log


def test_a_tracker_that_fails_midway_is_a_warning(tiny_model: Path, tmp_path: Path) -> None:
    def break_telemetry() -> None:
        from finetune_trainer.telemetry import Telemetry

        def track(self: Any, step: int, values: Any) -> None:
            raise RuntimeError("no more")

        Telemetry.track = track

    finished = train(job(tmp_path, tiny_model, RUN), tmp_path, before=break_telemetry)
    assert finished.exit_code == 0, finished.log
    assert finished.log.count("failed and is left out from here") == 1


def test_a_tracker_that_is_not_installed_is_said_before_weights_load(tiny_model: Path, tmp_path: Path) -> None:
    def uninstall() -> None:
        import importlib.util

        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "wandb" else real(name, *rest)

    finished = train(job(tmp_path, tiny_model, RUN | WANDB), tmp_path, before=uninstall)
    assert finished.exit_code == ExitCode.CONFIG_INVALID
    assert finished.message == "spec.logging.wandb: the wandb package is not installed here"
    assert "CheckingData" not in finished.log
