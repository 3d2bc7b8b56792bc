"""A run that is killed goes on as if it had never stopped: the same losses to the last bit, the same adapter."""

import importlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.exit_codes import ExitCode
from support.trainer.process import (
    Finished,
    TrainerProcess,
    job,
    metrics_lines,
    train,
)

#: Dropout, shuffling, an uneven last batch, evaluations and checkpoints at other steps than log lines; matrices large
#: enough for 8-bit state, and others.
RUN = {
    "lora.rank": 64,
    "training.maxSteps": None,
    "training.epochs": 2,
    "training.batchSize": 4,
    "training.microBatchSize": 2,
    "lora.dropout": 0.1,
    "evaluation.everySteps": 5,
    "checkpoint.everySteps": 3,
    "logging.everySteps": 2,
}
STEPS = 16  # 30 rows in batches of 4, twice


def _job(folder: Path, model: Path, changes: dict[str, Any] | None = None, *, uid: str | None = None) -> Path:
    from support.trainer.tiny_model import nli_rows, write_jsonl

    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "train.jsonl", nli_rows(30))
    write_jsonl(folder / "eval.jsonl", nli_rows(9, seed=5))
    return job(folder, model, RUN | (changes or {}), uid=uid)


@pytest.fixture(scope="module")
def unbroken(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    finished = train(_job(folder, tiny_model), folder)
    assert finished.exit_code == 0, finished.log
    return folder / "out"


def _assert_same(out: Path, unbroken: Path) -> None:
    assert metrics_lines(out) == metrics_lines(unbroken)
    assert (out / "adapter_model.safetensors").read_bytes() == (unbroken / "adapter_model.safetensors").read_bytes()


def test_the_same_seed_gives_the_same_losses(unbroken: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert metrics_lines(unbroken)[-1]["step"] == STEPS
    assert train(_job(tmp_path, tiny_model), tmp_path).exit_code == 0
    _assert_same(tmp_path / "out", unbroken)
    other = tmp_path / "other"
    assert train(_job(other, tiny_model, {"training.seed": 7}), other).exit_code == 0
    assert metrics_lines(other / "out") != metrics_lines(unbroken)


def test_sigterm_saves_exactly_this_step_and_exits_75(unbroken: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = _job(tmp_path, tiny_model, {"checkpoint.everySteps": 1000})
    for _ in range(2):
        process = TrainerProcess(config, tmp_path)
        process.wait_for('"stage": "Training"')
        process.wait_for('"event": "Step ')
        process.send(signal.SIGTERM)
        finished = process.finish()
        assert finished.exit_code == ExitCode.PREEMPTED, finished.log
        assert finished.report["reason"] == "Preempted"
        step = finished.report["progress"]["step"]
        assert f"step {step} is saved" in finished.message
        assert (tmp_path / f"out/checkpoints/step-{step:08d}/manifest.json").exists()
    assert train(config, tmp_path).exit_code == 0
    _assert_same(tmp_path / "out", unbroken)


@pytest.mark.nightly
def test_adapters_on_experts_go_on_as_if_they_had_never_stopped(tiny_experts: Path, tmp_path: Path) -> None:
    changes = {"lora.targetModules": ["q_proj", "gate_proj", "up_proj", "down_proj"], "lora.dropout": 0.0}
    whole = tmp_path / "whole"
    assert train(_job(whole, tiny_experts, changes), whole).exit_code == 0
    stopped = tmp_path / "stopped"
    process = TrainerProcess(_job(stopped, tiny_experts, changes), stopped)
    process.wait_for('"event": "Step ')
    process.send(signal.SIGTERM)
    assert process.finish().exit_code == ExitCode.PREEMPTED
    assert train(stopped / "job.yaml", stopped).exit_code == 0
    _assert_same(stopped / "out", whole / "out")


def _stop_in_batch(number: int) -> Callable[[], None]:
    """SIGTERM in the n-th batch of held-out rows; each evaluation takes five, and the first is before training."""

    def inject() -> None:
        from finetune_trainer.evaluation.evaluator import Evaluator

        original, calls = Evaluator.sum_loss, []

        def batch(self: Any, *args: Any) -> Any:
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args)

        Evaluator.sum_loss = batch

    return inject


@pytest.mark.parametrize(("batch", "step"), [(8, 5), (23, STEPS)], ids=["first", "last"])
def test_sigterm_during_an_evaluation_gives_it_up_and_does_it_later(
    batch: int, step: int, unbroken: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = _job(tmp_path, tiny_model)
    stopped = TrainerProcess(config, tmp_path, before=_stop_in_batch(batch)).finish()
    assert stopped.exit_code == ExitCode.PREEMPTED, stopped.log
    assert f"step {step} is saved" in stopped.message
    assert not (tmp_path / "out/manifest.json").exists()
    again = TrainerProcess(config, tmp_path, before=_stop_in_batch(3)).finish()
    assert again.exit_code == ExitCode.PREEMPTED, again.log
    assert f"step {step} is saved" in again.message
    finished = train(config, tmp_path)
    assert finished.exit_code == 0, finished.log
    assert finished.log.count(f"Evaluating at step {step}") == 1
    assert {"evalLoss", "evalLossBefore"} <= set(finished.report["metrics"])
    _assert_same(tmp_path / "out", unbroken)


def test_a_broken_newest_checkpoint_gives_way_to_the_one_before(
    unbroken: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = _job(tmp_path, tiny_model)
    process = TrainerProcess(config, tmp_path)
    process.wait_for("Checkpoint of step 6 is saved")
    process.send(signal.SIGKILL)
    process.finish()
    checkpoints = sorted((tmp_path / "out/checkpoints").glob("step-*"))
    weights = next(path for path in reversed(checkpoints) if (path / "manifest.json").exists()) / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    finished = train(config, tmp_path)
    assert finished.exit_code == 0, finished.log
    _assert_same(tmp_path / "out", unbroken)


def _die_in(target: str) -> Callable[[], None]:
    """SIGKILL where the trainer would call `room.module.name`, or `room.module.Class.name`."""

    def inject() -> None:
        room, module, *path, name = target.split(".")
        owner: Any = importlib.import_module(f"finetune_trainer.{room}.{module}")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))

    return inject


def test_killed_between_training_and_publishing_it_only_publishes(
    unbroken: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = _job(tmp_path, tiny_model)
    killed = TrainerProcess(config, tmp_path, before=_die_in("publishing.publish.AdapterOutput.publish")).finish()
    assert killed.exit_code == -signal.SIGKILL
    finished = train(config, tmp_path)
    assert finished.exit_code == 0, finished.log
    assert not _steps_trained(finished)
    _assert_same(tmp_path / "out", unbroken)


def test_killed_before_the_adapter_was_loaded_back_nothing_is_published(
    unbroken: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = _job(tmp_path, tiny_model, uid="1234")
    killed = TrainerProcess(
        config, tmp_path, before=_die_in("publishing.adapter_checks.PeftModel.from_pretrained")
    ).finish()
    assert killed.exit_code == -signal.SIGKILL
    assert (tmp_path / "out/adapter_model.safetensors").exists()
    assert not (tmp_path / "out/manifest.json").exists()
    finished = train(config, tmp_path)
    assert finished.exit_code == 0, finished.log
    assert "was loaded back with PEFT and computes the same" in finished.log
    _assert_same(tmp_path / "out", unbroken)


def test_killed_after_publishing_the_next_attempt_loads_it_back_and_reports_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    whole = train(_job(tmp_path / "whole", tiny_model, uid="1234"), tmp_path / "whole")
    config = _job(tmp_path, tiny_model, uid="1234")
    killed = TrainerProcess(config, tmp_path, before=_die_in("checkpoints.manager.CheckpointManager.delete")).finish()
    assert killed.exit_code == -signal.SIGKILL
    assert list((tmp_path / "out/checkpoints").glob("step-*"))
    finished = train(config, tmp_path)
    assert finished.exit_code == 0, finished.log
    assert "was loaded back with PEFT" in finished.log
    assert "LoadingModel" not in finished.log
    report, expected = finished.report, whole.report
    assert report["adapter"]["sizeBytes"] > 0
    timing = {"trainSeconds", "tokensPerSecond"}
    assert set(report["metrics"]) == set(expected["metrics"])
    assert [value for key, value in sorted(report["metrics"].items()) if key not in timing] == [
        value for key, value in sorted(expected["metrics"].items()) if key not in timing
    ]
    assert (report["progress"]["step"], report["progress"]["percent"]) == (STEPS, 100)
    assert not list((tmp_path / "out/checkpoints").glob("step-*"))


def test_an_adapter_that_peft_cannot_load_is_no_success(tiny_model: Path, tmp_path: Path) -> None:
    """Of an earlier attempt: its bytes are those of its manifest, and no adapter."""
    import hashlib

    config = _job(tmp_path, tiny_model, uid="1234")
    assert train(config, tmp_path).exit_code == 0
    weights, manifest = tmp_path / "out/adapter_model.safetensors", tmp_path / "out/manifest.json"
    weights.write_bytes(b"not what the name says")
    text = json.loads(manifest.read_text())
    (record,) = (file for file in text["files"] if file["path"] == weights.name)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    record |= {"sizeBytes": weights.stat().st_size, "sha256": digest}
    manifest.write_text(json.dumps(text))
    finished = train(config, tmp_path)
    assert finished.exit_code != 0
    assert finished.report["stage"] == "Failed"


def test_a_job_created_anew_publishes_what_the_old_one_had_finished(
    unbroken: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shared = {"checkpoint.uri": f"file://{tmp_path}/shared"}
    first = _job(tmp_path, tiny_model, shared, uid="old")
    assert (
        TrainerProcess(first, tmp_path, before=_die_in("publishing.publish.AdapterOutput.publish")).finish().exit_code
        == -signal.SIGKILL
    )
    anew = _job(tmp_path, tiny_model, shared | {"output.uri": f"file://{tmp_path}/new"}, uid="new")
    finished = train(anew, tmp_path)
    assert finished.exit_code == 0, finished.log
    assert not _steps_trained(finished)
    assert finished.report["resumedFrom"] == {"step": STEPS, "jobUid": "old"}
    assert f"checkpoint at step {STEPS}, which an earlier job of this name saved (uid old)" in finished.log
    _assert_same(tmp_path / "new", unbroken)


def test_a_job_with_other_data_at_the_same_uri_never_publishes_the_old_one(tiny_model: Path, tmp_path: Path) -> None:
    from support.trainer.tiny_model import nli_rows, write_jsonl

    shared = {"checkpoint.uri": f"file://{tmp_path}/shared"}
    first = _job(tmp_path, tiny_model, shared, uid="old")
    assert (
        TrainerProcess(first, tmp_path, before=_die_in("publishing.publish.AdapterOutput.publish")).finish().exit_code
        == -signal.SIGKILL
    )
    anew = _job(tmp_path, tiny_model, shared | {"output.uri": f"file://{tmp_path}/new"}, uid="new")
    write_jsonl(tmp_path / "train.jsonl", nli_rows(30, seed=77))
    refused = train(anew, tmp_path)
    assert refused.exit_code == ExitCode.CONFIG_INVALID, refused.log
    assert "holds checkpoints of a run with another model, data set or hyperparameters" in refused.message
    assert not (tmp_path / "new/manifest.json").exists()
    assert list((tmp_path / "shared").glob("step-*/manifest.json"))
    taken = train(anew, tmp_path, arguments=("--set", "output.overwrite=true"))
    assert taken.exit_code == 0, taken.log
    assert _steps_trained(taken)[0] == 2


def test_checkpoints_of_a_job_with_another_name_are_not_dropped_for_an_overwrite(
    tiny_model: Path, tmp_path: Path
) -> None:
    shared = {"checkpoint.uri": f"file://{tmp_path}/shared", "output.overwrite": True}
    first = _job(tmp_path, tiny_model, shared)
    first.write_text(first.read_text().replace("name: tiny", "name: busy"))
    assert (
        TrainerProcess(first, tmp_path, before=_die_in("publishing.publish.AdapterOutput.publish")).finish().exit_code
        == -signal.SIGKILL
    )
    refused = train(_job(tmp_path, tiny_model, shared | {"training.seed": 7}), tmp_path)
    assert refused.exit_code == ExitCode.CONFIG_INVALID, refused.log
    assert "holds checkpoints of another job (team/busy): choose another URI" in refused.message
    assert list((tmp_path / "shared").glob("step-*/manifest.json"))


def test_checkpoints_of_another_run_are_neither_used_nor_deleted(tiny_model: Path, tmp_path: Path) -> None:
    process = TrainerProcess(_job(tmp_path, tiny_model), tmp_path)
    process.wait_for("Checkpoint of step 3 is saved")
    process.send(signal.SIGTERM)
    process.finish()
    other = _job(tmp_path, tiny_model, {"training.learningRate": 0.02})
    refused = train(other, tmp_path)
    assert refused.exit_code == ExitCode.CONFIG_INVALID
    assert "holds checkpoints of a run with another model, data set or hyperparameters" in refused.message
    assert list((tmp_path / "out/checkpoints").glob("step-*/manifest.json"))
    taken = train(other, tmp_path, arguments=("--set", "output.overwrite=true"))
    assert taken.exit_code == 0, taken.log
    assert _steps_trained(taken)[0] == 2


def _steps_trained(finished: Finished) -> list[int]:
    steps = [event["event"] for event in finished.events if event["event"].startswith("Step ")]
    return [int(event.removeprefix("Step ")) for event in steps]


def test_layers_are_in_training_mode_from_the_first_step_of_every_attempt(tiny_model: Path, tmp_path: Path) -> None:
    def note_modes() -> None:
        from finetune_trainer.training.loop import QloraTrainer

        original = QloraTrainer.compute_loss

        def compute_loss(self: Any, *args: Any, **options: Any) -> Any:
            modes = {module.training for module in self.model.modules()}
            with (tmp_path / "modes").open("a") as file:
                file.write(f"{self.state.global_step} {sorted(modes)}\n")
            return original(self, *args, **options)

        QloraTrainer.compute_loss = compute_loss

    config = _job(tmp_path, tiny_model, {"evaluation.onStart": False, "evaluation.everySteps": 8})
    first = TrainerProcess(config, tmp_path, before=note_modes)
    first.wait_for('"event": "Step 2"')
    first.send(signal.SIGTERM)
    assert first.finish().exit_code == ExitCode.PREEMPTED
    assert TrainerProcess(config, tmp_path, before=note_modes).finish().exit_code == 0
    steps, modes = zip(*(line.split(maxsplit=1) for line in (tmp_path / "modes").read_text().splitlines()), strict=True)
    assert set(map(int, steps)) == set(range(STEPS))
    assert set(modes) == {"[True]"}
