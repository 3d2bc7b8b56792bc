"""Every way out writes the report, with the right exit code and one clear sentence; bad input never loads weights."""

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.exit_codes import ExitCode
from finetune_trainer.reporting.report import termination_message
from support.trainer.process import TrainerProcess, job, train
from support.trainer.tiny_model import nli_rows, write_jsonl


def _rows(folder: Path, *lines: str, name: str = "train.jsonl") -> None:
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "train.jsonl", nli_rows(40))
    write_jsonl(folder / "eval.jsonl", nli_rows(12, seed=5))
    (folder / name).write_text("\n".join(lines) + "\n" if lines else "")


GOOD = json.dumps(nli_rows(1)[0])
NLI = {"evaluation.metrics": ["loss", "nli"]}

REFUSED: dict[str, tuple[Callable[[Path], None] | None, dict[str, Any], ExitCode, str]] = {
    "broken JSON": (
        lambda f: _rows(f, GOOD, "{"), {}, ExitCode.DATASET_INVALID, "spec.dataset.train: train.jsonl:2: is not JSON",
    ),
    "missing column": (
        lambda f: _rows(f, GOOD, '{"txt": "a"}'), {}, ExitCode.DATASET_INVALID,
        "spec.dataset.train: train.jsonl:2: has no column 'text'; it has 'txt'",
    ),
    "unknown columns": (
        lambda f: _rows(f, '{"premise": "a"}'), {}, ExitCode.DATASET_INVALID,
        "spec.dataset.train: train.jsonl:1: columns are 'premise'",
    ),
    "empty file": (
        lambda f: _rows(f), {}, ExitCode.DATASET_INVALID, "spec.dataset.train: train.jsonl: has no rows",
    ),
    "not UTF-8": (
        lambda f: (_rows(f), (f / "train.jsonl").write_bytes(b'{"text": "\xff"}\n'))[0], {}, ExitCode.DATASET_INVALID,
        "spec.dataset.train: train.jsonl:1: is not UTF-8 text",
    ),
    "no such file": (
        None, {"dataset.train": "file:///nowhere/x.jsonl"}, ExitCode.DATASET_INVALID,
        "spec.dataset.train: file:///nowhere/x.jsonl does not exist",
    ),
    "no label in an answer": (
        lambda f: _rows(f, GOOD, '{"text": "[INST] a [/INST] yes"}', name="eval.jsonl"), NLI, ExitCode.DATASET_INVALID,
        "spec.dataset.eval: eval.jsonl:2: the answer has no JSON object with 'predicted_label'",
    ),
    "no answer marker": (
        lambda f: _rows(f, '{"text": "just text"}', name="eval.jsonl"), NLI, ExitCode.DATASET_INVALID,
        "spec.dataset.eval: eval.jsonl:1: 'text' has no answer marker '[/INST]'",
    ),
    "nothing left to learn": (
        lambda f: _rows(f, json.dumps({"prompt": "tea " * 200, "completion": "x"})), {}, ExitCode.DATASET_INVALID,
        "spec.dataset.train: no training row has a token left to learn from after truncation at training.maxLength 128",
    ),
    "no model": (
        None, {"model.source": "file:///nowhere/model"}, ExitCode.CONFIG_INVALID,
        "spec.model.source: file:///nowhere/model does not exist",
    ),
    "wrong layer name": (
        None, {"lora.targetModules": ["q_prj"]}, ExitCode.CONFIG_INVALID,
        "'q_prj' is no linear layer of this model; it has down_proj, gate_proj, k_proj",
    ),
    "too long for the model": (
        None, {"training.maxLength": 4096}, ExitCode.CONFIG_INVALID, "4096 is more than the 512 positions",
    ),
    "no GPU here": (None, {"resources.gpusPerNode": 1}, ExitCode.CONFIG_INVALID, "no GPU is visible"),
    "kernel without a GPU": (
        None, {"model.attention": "flash_attention_2"}, ExitCode.CONFIG_INVALID, "flash_attention_2 needs a GPU",
    ),
    "bad value": (
        None, {"lora.rank": -1}, ExitCode.CONFIG_INVALID,
        "spec.lora.rank: Invalid value: -1: should be greater than or equal to 1",
    ),
    "bad override": (None, {}, ExitCode.CONFIG_INVALID, "training.nonsense"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence_before_weights_load(case: str, tiny_model: Path, tmp_path: Path) -> None:
    prepare, changes, code, sentence = REFUSED[case]
    if prepare:
        prepare(tmp_path)
    arguments = ("--set", "training.nonsense=1") if case == "bad override" else ()
    finished = train(job(tmp_path, tiny_model, changes), tmp_path, arguments=arguments)
    assert finished.exit_code == code, finished.log
    assert sentence in finished.message
    assert finished.report["stage"] == "Failed"
    assert "Traceback" not in finished.log
    assert "LoadingModel" not in finished.log
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize(("role", "folder"), [("train", "a"), ("eval", "b")])
def test_of_two_files_with_one_name_the_bad_one_is_named(
    role: str, folder: str, tiny_model: Path, tmp_path: Path
) -> None:
    for each in ("a", "b"):
        _rows(tmp_path / each, GOOD, *(["{"] if each == folder else []), name="data.jsonl")
    changes = {"dataset.train": f"file://{tmp_path}/a/data.jsonl", "dataset.eval": f"file://{tmp_path}/b/data.jsonl"}
    finished = train(job(tmp_path, tiny_model, changes), tmp_path)
    assert finished.exit_code == ExitCode.DATASET_INVALID, finished.log
    assert finished.message.startswith(f"spec.dataset.{role}: data.jsonl:2: is not JSON")


def test_the_first_bad_rows_are_listed_and_the_rest_counted(tiny_model: Path, tmp_path: Path) -> None:
    _rows(tmp_path, GOOD, *["nonsense"] * 15)
    finished = train(job(tmp_path, tiny_model), tmp_path)
    lines = finished.message.splitlines()
    places = [line.partition(": is not JSON")[0] for line in lines[:10]]
    assert places == [f"spec.dataset.train: train.jsonl:{number}" for number in range(2, 12)]
    assert lines[10] == "… and 5 more bad rows"


def test_an_unexpected_error_leaves_its_traceback_in_the_log_alone(tiny_model: Path, tmp_path: Path) -> None:
    def sabotage() -> None:
        from finetune_trainer.publishing import adapter_checks

        adapter_checks.PeftModel = None

    finished = train(job(tmp_path, tiny_model, {"training.maxSteps": 1}), tmp_path, before=sabotage)
    assert finished.exit_code == 1
    assert finished.message.startswith("Unexpected ")
    assert "Traceback" not in finished.message
    assert "Traceback" in finished.log
    assert not (tmp_path / "out/manifest.json").exists()


def test_ctrl_c_saves_a_checkpoint_first(tiny_model: Path, tmp_path: Path) -> None:
    process = TrainerProcess(job(tmp_path, tiny_model, {"training.maxSteps": 500}), tmp_path)
    process.wait_for('"Step 3"')
    process.send(signal.SIGINT)
    finished = process.finish()
    assert finished.exit_code == ExitCode.PREEMPTED
    assert "is saved" in finished.message
    assert list((tmp_path / "out/checkpoints").glob("step-*/manifest.json"))
    assert not (tmp_path / "out/manifest.json").exists()


def test_being_stopped_before_training_loses_nothing(tiny_model: Path, tmp_path: Path) -> None:
    process = TrainerProcess(job(tmp_path, tiny_model), tmp_path, before=lambda: os.kill(os.getpid(), signal.SIGSTOP))
    os.waitpid(process.pid, os.WUNTRACED)
    process.send(signal.SIGCONT)
    process.wait_for("Serving /metrics")
    process.send(signal.SIGTERM)
    finished = process.finish()
    assert finished.exit_code == ExitCode.PREEMPTED
    assert "nothing is lost" in finished.message or "is saved" in finished.message


def test_a_port_in_use_is_a_warning(tiny_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env = {"FINETUNE_LISTEN": f"127.0.0.1:{taken.getsockname()[1]}"}
        finished = train(job(tmp_path, tiny_model, {"training.maxSteps": 1}), tmp_path, env=env)
    assert finished.exit_code == 0
    assert "Serving metrics and progress failed" in finished.log


def test_a_long_report_is_cut_to_fit_the_termination_message() -> None:
    from finetune_api.status import TrainerReport

    report = TrainerReport(stage="Failed", message="ü" * 9000, metrics={f"m{i}": 1 / 3 for i in range(50)})
    text = termination_message(report)
    assert len(text) <= 4096
    kept = TrainerReport.model_validate_json(text)
    assert kept.message.endswith("…")
    assert len(kept.metrics) == 50
    escapes = termination_message(TrainerReport(message="\n" * 4096, metrics={f"metric{i}": 1 / 3 for i in range(300)}))
    assert len(escapes) <= 4096
    assert json.loads(escapes)["stage"] == "Starting"
