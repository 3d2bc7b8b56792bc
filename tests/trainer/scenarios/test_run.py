"""A whole run on real files: trained on the CPU with NF4 weights, published, loaded back, reported."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api import constants, exit_codes
from finetune_api.status import TrainerReport
from support.trainer.process import (
    Finished,
    TrainerProcess,
    job,
    metrics_lines,
    train,
)


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    folder = tmp_path_factory.mktemp("run")
    changes = {
        "evaluation.metrics": ["loss", "nli"],
        "evaluation.generation": {"maxNewTokens": 8, "maxRows": 4},
        "output.keepCheckpoints": True,
    }
    return train(job(folder, tiny_model, changes, uid="1234"), folder), folder


def test_it_succeeds_and_says_so_in_the_termination_message(run: tuple[Finished, Path]) -> None:
    finished, folder = run
    assert finished.exit_code == 0, finished.log
    report = TrainerReport.model_validate(finished.report)
    assert (report.stage, report.reason) == ("Succeeded", "Succeeded")
    assert report.adapter is not None
    assert report.adapter.uri == f"file://{folder}/out"
    assert report.adapter.base_model.startswith("file://")
    assert (report.progress.step, report.progress.total_steps, report.progress.percent) == (6, 6, 100)
    assert report.execution_plan is not None
    assert (report.execution_plan.micro_batch_size, report.execution_plan.gradient_accumulation_steps) == (4, 1)


def test_training_lowers_the_held_out_loss(run: tuple[Finished, Path]) -> None:
    metrics = run[0].report["metrics"]
    assert metrics["evalLoss"] < metrics["evalLossBefore"] - 0.05
    assert {"trainLoss", "accuracy", "f1", "validJson", "accuracyBefore", "tokensPerSecond", "trainSeconds"} <= set(
        metrics
    )
    assert sum(value for key, value in metrics.items() if key.startswith("confusion.")) == 4


def test_all_files_of_an_adapter_are_there(run: tuple[Finished, Path]) -> None:
    out = run[1] / "out"
    manifest = json.loads((out / constants.MANIFEST_FILE).read_text())
    assert {file["path"] for file in manifest["files"]} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "training/answers.jsonl",
        "training/environment.json",
        "training/job.yaml",
        "training/log.txt",
        "training/loss.png",
        "training/metrics.jsonl",
    }
    assert manifest["metrics"] == run[0].report["metrics"]
    assert (out / "training/loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "checkpoints/step-00000006/manifest.json").exists()


def test_the_answers_are_those_that_the_metrics_count(run: tuple[Finished, Path]) -> None:
    answers = [json.loads(line) for line in (run[1] / "out" / constants.ANSWERS_FILE).read_text().splitlines()]
    assert [each["row"] for each in answers] == list(range(4))
    assert all(each["prompt"].endswith("[/INST]") and "predicted_label" in each["expected"] for each in answers)
    assert sum(each["right"] for each in answers) / 4 == run[0].report["metrics"]["accuracy"]


def test_the_adapter_loads_on_a_fresh_base_and_changes_it(run: tuple[Finished, Path], tiny_model: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        before = base(ids).logits.clone()
        after = PeftModel.from_pretrained(base, run[1] / "out")(ids).logits
    assert not torch.allclose(before, after, atol=1e-2)


def test_the_cards_code_runs_as_printed_in_the_published_folder(
    run: tuple[Finished, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run[1] / "out")
    card = Path("README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    [command] = re.findall(r"```sh\n(vllm serve .*?)```", card, re.DOTALL)
    folder, adapter = shlex.split(command)[2], shlex.split(command)[-1].partition("=")[2]
    assert (Path(folder) / "config.json").exists() and (Path(adapter) / "adapter_config.json").exists()


def test_no_path_of_this_machine_stands_in_for_the_base_model(run: tuple[Finished, Path], tiny_model: Path) -> None:
    config = json.loads((run[1] / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"file://{tiny_model}"
    card = (run[1] / "out/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in front, "a hub takes ids of its own alone"
    assert front["library_name"] == "peft"
    assert {each["type"] for each in front["model-index"][0]["results"][0]["metrics"]} >= {"loss", "accuracy", "f1"}
    for part in ("PeftModel.from_pretrained", "vllm serve", "held-out loss", "Confusion matrix", "rank 4, alpha 8"):
        assert part in card


def test_the_resolved_job_runs_again_as_it_is(run: tuple[Finished, Path]) -> None:
    from finetune_api.manifest import load_file

    resolved = load_file(run[1] / "out/training/job.yaml")
    assert resolved.spec.training.warmup_ratio == 0.03
    assert resolved.metadata.uid == "1234"


def test_metrics_are_recorded_step_by_step(run: tuple[Finished, Path]) -> None:
    lines = metrics_lines(run[1] / "out")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "evalLoss" in line] == [3, 6]
    assert "evalLossBefore" in lines[0]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_the_same_job_again_finds_its_adapter_and_another_is_refused(
    run: tuple[Finished, Path], tiny_model: Path, tmp_path: Path
) -> None:
    folder = run[1]
    again = train(job(folder, tiny_model, uid="1234"), tmp_path / "again")
    assert again.exit_code == 0
    assert again.report["adapter"] == run[0].report["adapter"]
    other = train(job(folder, tiny_model, uid="other"), tmp_path / "other")
    assert other.exit_code == exit_codes.ExitCode.CONFIG_INVALID
    assert "already holds an adapter (of team/tiny" in other.message
    assert "LoadingModel" not in other.log


def test_metrics_and_progress_are_served_while_it_runs(tiny_model: Path, tmp_path: Path) -> None:
    import urllib.request

    changes = {"training.maxSteps": 400, "evaluation.onStart": False, "evaluation.everySteps": 1000}
    process = TrainerProcess(job(tmp_path, tiny_model, changes), tmp_path)
    process.wait_for('"Step 2"')
    address = next(event["address"] for event in _events(process.log) if "address" in event)
    try:
        with urllib.request.urlopen(f"http://{address}/progress") as answer:
            report = TrainerReport.model_validate_json(answer.read())
        with urllib.request.urlopen(f"http://{address}/metrics") as answer:
            text = answer.read().decode()
    finally:
        import signal

        process.send(signal.SIGTERM)
        finished = process.finish()
    assert report.stage == "Training"
    assert report.progress.total_steps == 400
    assert report.progress.loss is not None
    assert report.progress.estimated_completion_time is not None
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(samples["finetune_trainer_steps"]) == 400
    assert float(samples["finetune_trainer_tokens_per_second"]) > 0
    assert finished.exit_code == exit_codes.ExitCode.PREEMPTED


def _events(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


def test_on_a_terminal_it_draws_a_bar_and_readable_lines(tiny_model: Path, tmp_path: Path) -> None:
    import os
    import pty

    controller, terminal = pty.openpty()

    def attach() -> None:
        os.dup2(terminal, 2)

    process = TrainerProcess(
        job(tmp_path, tiny_model), tmp_path, before=attach, env={"TERM": "xterm-256color", "COLUMNS": "150"}
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(controller, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not part:
            break
        shown += part
    os.close(controller)
    assert process.finish().exit_code == 0
    text = shown.decode()
    assert "step 6/6" in text
    assert "tokens/s" in text
    assert "loss " in text
    assert "ETA" in text
    assert not [line for line in text.splitlines() if line.startswith("{")]
    assert "The adapter is published at" in text


def test_an_adapter_is_not_replaced_by_one_that_does_not_load(tiny_model: Path, tmp_path: Path) -> None:
    def spoil_what_is_saved() -> None:
        from safetensors.torch import load_file, save_file

        from finetune_trainer.model import adapter

        original = adapter.save_adapter

        def save_adapter(adapted: Any, folder: Path) -> None:
            original(adapted, folder)
            weights = load_file(folder / constants.ADAPTER_WEIGHTS_FILE)
            save_file({name: weight + 0.5 for name, weight in weights.items()}, folder / constants.ADAPTER_WEIGHTS_FILE)

        adapter.save_adapter = save_adapter

    changes = {"training.maxSteps": 1, "output.overwrite": True}
    first = train(job(tmp_path, tiny_model, changes, uid="first"), tmp_path)
    assert first.exit_code == 0, first.log
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    second = TrainerProcess(job(tmp_path, tiny_model, changes, uid="second"), tmp_path, before=spoil_what_is_saved)
    finished = second.finish()
    assert "loaded back, has other weights than were trained" in finished.message, finished.log
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


def test_after_success_only_its_own_checkpoints_are_removed(tiny_model: Path, tmp_path: Path) -> None:
    shared = tmp_path / "scratch"
    shared.mkdir()
    (shared / "notes.txt").write_text("not ours")
    changes = {"training.maxSteps": 4, "checkpoint.everySteps": 2, "checkpoint.uri": f"file://{shared}"}
    finished = train(job(tmp_path / "run", tiny_model, changes), tmp_path / "run")
    assert finished.exit_code == 0, finished.log
    assert "Checkpoint of step 2 is saved" in finished.log
    assert [path.name for path in shared.iterdir() if path.is_file()] == ["notes.txt"]
    assert not list(shared.glob("step-*/manifest.json"))
