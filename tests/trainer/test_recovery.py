"""Out of GPU memory and a loss that is no number. The GPU's error is injected: there is none here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.names import ExitCode
from support.trainer_process import TrainerProcess, job, metrics_lines, train

RUN = {"training.batchSize": 8, "lora.dropout": 0.0, "evaluation.onStart": False}


def _out_of_memory(at: Callable[[Any], bool]) -> Callable[[], None]:
    """Raise CUDA's error in a forward pass whenever `at` (trainer) says so."""

    def inject() -> None:
        import torch
        from trl import SFTTrainer

        original = SFTTrainer.compute_loss

        def compute_loss(self: Any, model: Any, inputs: Any, **options: Any) -> Any:
            if self.model.training and at(self):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")
            return original(self, model, inputs, **options)

        SFTTrainer.compute_loss = compute_loss

    return inject


def _micro_batch_above(size: int, step: int) -> Callable[[Any], bool]:
    return lambda trainer: trainer.state.global_step >= step and trainer.args.per_device_train_batch_size > size


@pytest.mark.parametrize("step", [0, 3])
def test_a_simulated_oom_halves_the_micro_batch_and_changes_nothing_else(
    step: int, tiny_model: Path, tmp_path: Path
) -> None:
    plain = train(job(tmp_path / "plain", tiny_model, RUN), tmp_path / "plain")
    config = job(tmp_path / "oom", tiny_model, RUN)
    finished = train(config, tmp_path / "oom", before=_out_of_memory(_micro_batch_above(2, step)))
    assert (plain.exit_code, finished.exit_code) == (0, 0), finished.log
    plan = finished.report["executionPlan"]
    assert (plan["microBatchSize"], plan["gradientAccumulationSteps"]) == (2, 4)
    assert plain.report["executionPlan"]["microBatchSize"] == 8
    losses = [
        [line["loss"] for line in metrics_lines(tmp_path / name / "out") if "loss" in line] for name in ("plain", "oom")
    ]
    assert len(losses[1]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)  # bfloat16 sums in another order
    assert finished.log.count("same effective batch") == 2


def test_a_simulated_oom_at_micro_batch_1_says_what_to_change(tiny_model: Path, tmp_path: Path) -> None:
    finished = train(job(tmp_path, tiny_model, RUN), tmp_path, before=_out_of_memory(_micro_batch_above(0, 3)))
    assert finished.exit_code == ExitCode.GPU_OUT_OF_MEMORY
    assert finished.report["reason"] == "GpuOutOfMemory"
    assert "at micro-batch 1: lower training.maxLength" in finished.message
    assert list((tmp_path / "out/checkpoints").glob("step-*/manifest.json"))


def test_a_simulated_oom_fails_at_once_when_the_manifest_says_so(tiny_model: Path, tmp_path: Path) -> None:
    config = job(tmp_path, tiny_model, RUN | {"recovery.onOutOfMemory": "Fail"})
    finished = train(config, tmp_path, before=_out_of_memory(_micro_batch_above(2, 0)))
    assert finished.exit_code == ExitCode.GPU_OUT_OF_MEMORY
    assert "at micro-batch 8" in finished.message


@pytest.mark.parametrize("every", [2, 1000])
def test_a_simulated_oom_inside_the_optimizer_goes_back_to_a_whole_state(
    every: int, tiny_model: Path, tmp_path: Path
) -> None:
    """To the checkpoint of step 2, or, when there is none yet, to the beginning."""

    def inject() -> None:
        import torch
        from transformers import TrainerCallback

        from finetune_trainer.callbacks import RunCallback

        original, raised = RunCallback.on_pre_optimizer_step, []

        def on_pre_optimizer_step(self: TrainerCallback, *args: Any, **options: Any) -> None:
            original(self, *args, **options)
            if self.trainer.state.global_step == 3 and not raised:
                raised.append(True)
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")

        RunCallback.on_pre_optimizer_step = on_pre_optimizer_step

    changes = RUN | {"checkpoint.everySteps": every}
    plain = train(job(tmp_path / "plain", tiny_model, changes), tmp_path / "plain")
    finished = train(job(tmp_path, tiny_model, changes), tmp_path, before=inject)
    assert (plain.exit_code, finished.exit_code) == (0, 0), finished.log
    steps = [line["step"] for line in metrics_lines(tmp_path / "out") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]  # some were done twice, and count once
    assert finished.report["metrics"]["evalLoss"] == pytest.approx(plain.report["metrics"]["evalLoss"], rel=2e-3)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_run_with_the_step(value: str, tiny_model: Path, tmp_path: Path) -> None:
    def inject() -> None:
        from trl import SFTTrainer

        original = SFTTrainer.compute_loss

        def compute_loss(self: Any, *args: Any, **options: Any) -> Any:
            loss = original(self, *args, **options)
            return loss * float(value) if self.state.global_step == 4 else loss

        SFTTrainer.compute_loss = compute_loss

    config = job(tmp_path, tiny_model, {"checkpoint.everySteps": 1, "logging.everySteps": 10})
    finished = TrainerProcess(config, tmp_path, before=inject).finish()
    assert finished.exit_code == ExitCode.DIVERGED
    assert "became NaN or infinite at step 5" in finished.message
    saved = sorted(path.parent.name for path in (tmp_path / "out/checkpoints").glob("step-*/manifest.json"))
    assert saved == ["step-00000003", "step-00000004"]
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_simulated_oom_in_an_evaluation_only_shrinks_the_evaluations_batch(tiny_model: Path, tmp_path: Path) -> None:
    def inject() -> None:
        import torch

        from finetune_trainer import evaluate
        from finetune_trainer.evaluate import Evaluator

        def limited(original: Any, size: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                if size(args) > 3:
                    raise torch.OutOfMemoryError("CUDA out of memory (injected)")
                return original(*args, **options)

            return call

        Evaluator._batch = limited(Evaluator._batch, lambda args: len(args[1]))
        evaluate.answers = limited(evaluate.answers, lambda args: len(args[2]))

    nli = {"evaluation.metrics": ["loss", "nli"], "evaluation.generation": {"maxNewTokens": 4}}
    plain = train(job(tmp_path / "plain", tiny_model, RUN | nli), tmp_path / "plain")
    finished = train(job(tmp_path / "oom", tiny_model, RUN | nli), tmp_path / "oom", before=inject)
    assert (plain.exit_code, finished.exit_code) == (0, 0), finished.log
    assert finished.report["executionPlan"]["microBatchSize"] == 8
    assert finished.report["metrics"]["evalLoss"] == pytest.approx(plain.report["metrics"]["evalLoss"], rel=1e-3)
    assert finished.report["metrics"]["accuracy"] == plain.report["metrics"]["accuracy"]
