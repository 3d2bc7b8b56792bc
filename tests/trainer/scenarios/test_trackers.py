"""The same numbers reach Weights & Biases (offline) and MLflow; a tracker's trouble never ends a run."""

import json
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.exit_codes import ExitCode
from support.trainer.process import (
    TrainerProcess,
    job,
    metrics_lines,
    train,
)
from support.trainer.two_ranks import Pair

KEY = "0123456789abcdef0123456789abcdef01234567"
RUN: dict[str, Any] = {"training.maxSteps": 3, "evaluation.everySteps": 3, "evaluation.onStart": False}
NLI = {
    "evaluation.onStart": True,
    "evaluation.metrics": ["loss", "nli"],
    "evaluation.generation": {"maxNewTokens": 4, "maxRows": 2},
}
WANDB = {"logging.wandb": {"project": "nli", "name": "first"}}


def test_weights_and_biases_gets_every_number_offline(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "secrets/wandb").mkdir(parents=True)
    (tmp_path / "secrets/wandb/WANDB_API_KEY").write_text(KEY)
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path / "wandb"), "HOME": str(tmp_path)}
    (tmp_path / "wandb").mkdir()
    finished = train(job(tmp_path, tiny_model, RUN | NLI | WANDB), tmp_path, env=env)
    assert finished.exit_code == 0, finished.log
    assert "Metrics also go to Weights & Biases" in finished.log
    (record,) = (tmp_path / "wandb").rglob("run-*.wandb")
    kept = _history(record)
    lines = metrics_lines(tmp_path / "out")
    for key in ("loss", "evalLoss", "evalLossBefore"):
        expected = [line[key] for line in lines if key in line]
        assert expected
        assert [values[key] for values in kept if key in values] == pytest.approx(expected)
    final = {f"final/{key}": value for key, value in finished.report["metrics"].items() if key != "trainLoss"}
    assert {"final/accuracyBefore", "final/f1", "final/evalLoss", "final/tokensPerSecond"} <= final.keys()
    assert {key: value for key, value in kept[-1].items() if key in final} == pytest.approx(final)
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


def test_mlflow_gets_every_number_and_the_settings_from_all_attempts_in_one_run(
    tiny_model: Path, tmp_path: Path
) -> None:
    env = {"MLFLOW_EXPERIMENT_NAME": "nli", "MLFLOW_ALLOW_FILE_STORE": "true"}
    (tmp_path / "secrets/output").mkdir(parents=True)
    (tmp_path / "secrets/output/MLFLOW_TRACKING_URI").write_text(f"file://{tmp_path}/mlruns")
    config = job(tmp_path, tiny_model, RUN | NLI | {"training.maxSteps": 40}, uid="11111111-2222")
    stopped = TrainerProcess(config, tmp_path, env=env)
    stopped.wait_for('"event": "Step 2"')
    stopped.send(signal.SIGTERM)
    assert stopped.finish().exit_code == ExitCode.PREEMPTED
    (meta,) = (tmp_path / "mlruns").rglob("metrics/loss")
    assert "status: 4" in (meta.parent.parent / "meta.yaml").read_text()  # MLflow's FAILED
    finished = train(config, tmp_path, env=env)
    assert finished.exit_code == 0, finished.log
    assert "Metrics also go to MLflow" in finished.log
    (file,) = (tmp_path / "mlruns").rglob("metrics/loss")  # one run for both attempts
    metrics, run = file.parent, file.parent.parent

    def kept(name: str) -> list[float]:
        return [float(line.split()[1]) for line in (metrics / name).read_text().splitlines()]

    lines = metrics_lines(tmp_path / "out")
    for key in ("loss", "evalLoss", "evalLossBefore"):
        assert kept(key) == pytest.approx([line[key] for line in lines if key in line])
    final = {key: value for key, value in finished.report["metrics"].items() if key != "trainLoss"}
    assert {"accuracyBefore", "f1", "evalLoss", "tokensPerSecond"} <= final.keys()
    assert {key: kept(f"final/{key}") for key in final} == {key: pytest.approx([value]) for key, value in final.items()}
    assert (run / "params/lora.rank").read_text() == "4"
    assert "status: 3" in (run / "meta.yaml").read_text()  # FINISHED


@pytest.mark.parametrize(
    ("uri", "secrets"),
    [
        ("nonsense://user:s3cr3t@x", ["s3cr3t"]),
        ("http://user:s3cr3t/odd@127.0.0.1:9", ["s3cr3t"]),
        ("http://127.0.0.1:9", ["t0ken"]),
    ],
)
def test_a_tracker_that_cannot_start_is_a_warning_without_its_password(
    uri: str, secrets: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    env = {"MLFLOW_TRACKING_URI": uri, "HOME": str(tmp_path), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    (tmp_path / "secrets/output").mkdir(parents=True)
    (tmp_path / "secrets/output/MLFLOW_TRACKING_TOKEN").write_text("t0ken")
    finished = train(job(tmp_path, tiny_model, RUN), tmp_path, env=env)
    assert finished.exit_code == 0, finished.log
    assert "MLflow failed to start; disabled for this run" in finished.log
    published = [path.read_text(errors="replace") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [text for text in [finished.log, *published] for secret in secrets if secret in text]


def test_of_two_processes_one_alone_opens_a_run(tiny_model: Path, tmp_path: Path) -> None:
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path), "WANDB_API_KEY": KEY}
    changes = RUN | WANDB | {"resources.nodes": 2, "training.batchSize": 8, "dataset.eval": None}
    both = Pair(job(tmp_path, tiny_model, changes), tmp_path, env).finish()
    assert [each.exit_code for each in both] == [0, 0], both[0].log + both[1].log
    assert ["Metrics also go to" in each.log for each in both] == [True, False]
    assert len(list(tmp_path.rglob("run-*.wandb"))) == 1


def test_a_tracker_that_fails_midway_is_a_warning(tiny_model: Path, tmp_path: Path) -> None:
    def break_telemetry() -> None:
        from finetune_trainer.reporting.prometheus import Telemetry

        def track(self: Any, step: int, values: Any) -> None:
            raise RuntimeError("no more")

        Telemetry.track = track

    finished = train(job(tmp_path, tiny_model, RUN), tmp_path, before=break_telemetry)
    assert finished.exit_code == 0, finished.log
    assert finished.log.count("failed; disabled for the rest of this run") == 1


def test_a_tracker_that_is_not_installed_is_said_before_weights_load(tiny_model: Path, tmp_path: Path) -> None:
    def uninstall() -> None:
        import importlib.util

        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "wandb" else real(name, *rest)

    finished = train(job(tmp_path, tiny_model, RUN | WANDB), tmp_path, before=uninstall)
    assert finished.exit_code == ExitCode.CONFIG_INVALID
    assert finished.message == "spec.logging.wandb: the wandb package is not installed here"
    assert "CheckingData" not in finished.log
