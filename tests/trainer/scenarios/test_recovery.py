"""Out of GPU memory. The error is injected: there is no GPU here."""

from collections.abc import Callable
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

RUN = {"training.batchSize": 8, "lora.dropout": 0.0, "evaluation.onStart": False}


def _out_of_memory(at: Callable[[Any], bool]) -> Callable[[], None]:
    """Raise CUDA's error in a forward pass whenever `at` (trainer) says so."""

    def inject() -> None:
        import torch

        from finetune_trainer.training.loop import QloraTrainer

        original = QloraTrainer.compute_loss

        def compute_loss(self: Any, model: Any, inputs: Any, **options: Any) -> Any:
            if self.model.training and at(self):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")
            return original(self, model, inputs, **options)

        QloraTrainer.compute_loss = compute_loss

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

        from finetune_trainer.training.hooks import TrainingHooks

        original, raised = TrainingHooks.on_pre_optimizer_step, []

        def on_pre_optimizer_step(self: TrainerCallback, args: Any, state: Any, *rest: Any, **options: Any) -> None:
            original(self, args, state, *rest, **options)
            if state.global_step == 3 and not raised:
                raised.append(True)
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")

        TrainingHooks.on_pre_optimizer_step = on_pre_optimizer_step

    changes = RUN | {"checkpoint.everySteps": every}
    plain = train(job(tmp_path / "plain", tiny_model, changes), tmp_path / "plain")
    finished = train(job(tmp_path, tiny_model, changes), tmp_path, before=inject)
    assert (plain.exit_code, finished.exit_code) == (0, 0), finished.log
    steps = [line["step"] for line in metrics_lines(tmp_path / "out") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]  # some were done twice, and count once
    assert finished.report["metrics"]["evalLoss"] == pytest.approx(plain.report["metrics"]["evalLoss"], rel=2e-3)


def test_weights_that_do_not_fit_are_no_matter_of_the_micro_batch(tiny_model: Path, tmp_path: Path) -> None:
    def inject() -> None:
        import torch

        from finetune_trainer import steps

        def load_base_model(*args: Any, **options: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

        steps.load_base_model = load_base_model

    changes = {"quantization": {"bits": 16, "computeDtype": "bfloat16"}}
    finished = TrainerProcess(job(tmp_path, tiny_model, changes), tmp_path, before=inject).finish()
    assert finished.report["reason"] == "WontFit", finished.log
    assert finished.exit_code == ExitCode.CONFIG_INVALID
    sentence = f"the 16-bit weights of file://{tiny_model} do not fit in GPU memory: set quantization.bits: 4"
    assert sentence in finished.message


def test_a_step_that_ran_out_of_memory_leaves_no_trace_in_the_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    """Neither its tokens nor the random numbers its dropout drew."""

    def inject() -> None:
        import torch

        from finetune_trainer.training.loop import QloraTrainer

        original = QloraTrainer.compute_loss

        def compute_loss(self: Any, *args: Any, **options: Any) -> Any:
            loss = original(self, *args, **options)
            if self.state.global_step == 3 and self.args.per_device_train_batch_size == 4:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            return loss

        QloraTrainer.compute_loss = compute_loss

    import json

    import torch

    changes = {"checkpoint.everySteps": 3, "checkpoint.keep": 9, "lora.dropout": 0.1, "output.keepCheckpoints": True}
    plain = train(job(tmp_path / "plain", tiny_model, changes), tmp_path / "plain")
    without_one_at_3 = job(tmp_path / "oom", tiny_model, changes | {"checkpoint.everySteps": 100})
    finished = train(without_one_at_3, tmp_path / "oom", before=inject)
    assert (plain.exit_code, finished.exit_code) == (0, 0), finished.log
    saved = [tmp_path / name / "out/checkpoints/step-00000003" for name in ("plain", "oom")]
    states = [json.loads((folder / "finetune_state.json").read_text()) for folder in saved]
    assert states[0]["tokens"] == states[1]["tokens"] > 0
    draws = [torch.load(folder / "rng_state.pth", weights_only=False)["cpu"] for folder in saved]
    assert torch.equal(*draws)
    ends = [tmp_path / name / "out/checkpoints/step-00000006/finetune_state.json" for name in ("plain", "oom")]
    tokens = [json.loads(end.read_text())["tokens"] for end in ends]
    assert tokens[0] == tokens[1]


def test_an_evaluation_that_ran_out_of_memory_is_done_after_all(tiny_model: Path, tmp_path: Path) -> None:
    """Even with one row at a time; the next try has more room, and begins with the evaluation."""

    def inject() -> None:
        import torch

        from finetune_trainer.evaluation.evaluator import Evaluator

        original, raised = Evaluator.evaluate, []

        def evaluate(self: Any, *args: Any) -> dict[str, float]:
            if not raised:
                raised.append(True)
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            return original(self, *args)

        Evaluator.evaluate = evaluate

    finished = train(job(tmp_path, tiny_model, RUN), tmp_path, before=inject)
    assert finished.exit_code == 0, finished.log
    lines = metrics_lines(tmp_path / "out")
    assert [line["step"] for line in lines if "evalLoss" in line] == [3, 6]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_simulated_oom_in_an_evaluation_only_shrinks_the_evaluations_batch(tiny_model: Path, tmp_path: Path) -> None:
    def inject() -> None:
        import torch

        from finetune_trainer.evaluation.evaluator import Evaluator
        from finetune_trainer.evaluation.generation import AnswerGenerator

        def limited(original: Any, size: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                if size(args) > 3:
                    raise torch.OutOfMemoryError("CUDA out of memory (injected)")
                return original(*args, **options)

            return call

        Evaluator.sum_loss = limited(Evaluator.sum_loss, lambda args: len(args[2]))
        AnswerGenerator.__call__ = limited(AnswerGenerator.__call__, lambda args: len(args[2]))

    nli = {"evaluation.metrics": ["loss", "nli"], "evaluation.generation": {"maxNewTokens": 4}}
    plain = train(job(tmp_path / "plain", tiny_model, RUN | nli), tmp_path / "plain")
    finished = train(job(tmp_path / "oom", tiny_model, RUN | nli), tmp_path / "oom", before=inject)
    assert (plain.exit_code, finished.exit_code) == (0, 0), finished.log
    assert finished.report["executionPlan"]["microBatchSize"] == 8
    assert finished.report["metrics"]["evalLoss"] == pytest.approx(plain.report["metrics"]["evalLoss"], rel=1e-3)
    assert finished.report["metrics"]["accuracy"] == plain.report["metrics"]["accuracy"]
