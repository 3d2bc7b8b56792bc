"""A loss, gradient or weight that is no number ends the run, says where, and is neither kept nor published."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.exit_codes import ExitCode
from support.trainer.process import TrainerProcess, job, metrics_lines


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_run_with_the_step(value: str, tiny_model: Path, tmp_path: Path) -> None:
    def inject() -> None:
        from finetune_trainer.training.loop import QloraTrainer

        original = QloraTrainer.compute_loss

        def compute_loss(self: Any, *args: Any, **options: Any) -> Any:
            loss = original(self, *args, **options)
            return loss * float(value) if self.state.global_step == 4 else loss

        QloraTrainer.compute_loss = compute_loss

    config = job(tmp_path, tiny_model, {"checkpoint.everySteps": 1, "logging.everySteps": 10})
    finished = TrainerProcess(config, tmp_path, before=inject).finish()
    assert finished.exit_code == ExitCode.DIVERGED
    assert "became NaN or infinite at step 5" in finished.message
    assert _saved(tmp_path) == ["step-00000003", "step-00000004"]
    assert not (tmp_path / "out/manifest.json").exists()


def _saved(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in (folder / "out/checkpoints").glob("step-*/manifest.json"))


def _after_backward(change: Callable[[Any], None]) -> Callable[[], None]:
    """Call `change` (trainer) after every forward and backward pass: the loss is what it was."""

    def inject() -> None:
        from finetune_trainer.training.loop import QloraTrainer

        original = QloraTrainer.training_step

        def training_step(self: Any, *args: Any, **options: Any) -> Any:
            loss = original(self, *args, **options)
            change(self)
            return loss

        QloraTrainer.training_step = training_step

    return inject


def _spoil_gradient(trainer: Any) -> None:
    parameter = next(p for p in trainer.model.parameters() if p.grad is not None)
    parameter.grad.fill_(float("nan"))


@pytest.mark.parametrize("logging", [1, 10])
def test_a_gradient_that_is_no_number_ends_the_run_with_the_step(
    logging: int, tiny_model: Path, tmp_path: Path
) -> None:
    def at_step_5(trainer: Any) -> None:
        if trainer.state.global_step == 4:
            _spoil_gradient(trainer)

    config = job(tmp_path, tiny_model, {"checkpoint.everySteps": 1, "logging.everySteps": logging})
    finished = TrainerProcess(config, tmp_path, before=_after_backward(at_step_5)).finish()
    assert finished.exit_code == ExitCode.DIVERGED, finished.log
    assert "became NaN or infinite at step 5" in finished.message
    assert _saved(tmp_path) == ["step-00000003", "step-00000004"]


def _with_loss_scale(then: Callable[[], None]) -> Callable[[], None]:
    """Train with PyTorch's loss scaler, as fp16 does on a GPU (Accelerate has none on a CPU)."""

    def inject() -> None:
        import torch

        from finetune_trainer.training.loop import QloraTrainer

        original = QloraTrainer.__init__

        def init(self: Any, *args: Any, **options: Any) -> None:
            original(self, *args, **options)
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

        QloraTrainer.__init__ = init
        then()

    return inject


def test_a_step_that_fp16_skips_to_find_its_scale_is_no_divergence(tiny_model: Path, tmp_path: Path) -> None:
    def at_step_3(trainer: Any) -> None:
        if trainer.state.global_step == 2:
            _spoil_gradient(trainer)

    config = job(tmp_path, tiny_model, {"evaluation.onStart": False, "checkpoint.everySteps": 1})
    finished = TrainerProcess(config, tmp_path, before=_with_loss_scale(_after_backward(at_step_3))).finish()
    assert finished.exit_code == 0, finished.log
    steps = {line["step"]: line for line in metrics_lines(tmp_path / "out") if "loss" in line}
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    assert "gradNorm" not in steps[3]  # it was none, and JSON has no word for that
    assert "gradNorm" in steps[4]


def test_a_loss_scale_that_never_fits_is_divergence(tiny_model: Path, tmp_path: Path) -> None:
    config = job(tmp_path, tiny_model, {"evaluation.onStart": False})
    finished = TrainerProcess(config, tmp_path, before=_with_loss_scale(_after_backward(_spoil_gradient))).finish()
    assert finished.exit_code == ExitCode.DIVERGED, finished.log
    assert "at step 6" in finished.message
    assert not (tmp_path / "out/manifest.json").exists()


def test_weights_that_are_no_numbers_are_never_saved(tiny_model: Path, tmp_path: Path) -> None:
    def inject() -> None:
        import torch

        from finetune_trainer.training.hooks import TrainingHooks

        original = TrainingHooks.on_step_end

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
            if state.global_step == 4:
                with torch.no_grad():
                    next(p for p in options["model"].parameters() if p.requires_grad)[0] = float("inf")
            original(self, args, state, control, **options)

        TrainingHooks.on_step_end = on_step_end

    config = job(tmp_path, tiny_model, {"checkpoint.everySteps": 1, "evaluation.everySteps": 100})
    finished = TrainerProcess(config, tmp_path, before=inject).finish()
    assert finished.exit_code == ExitCode.DIVERGED, finished.log
    assert "became NaN or infinite at step 4" in finished.message
    assert _saved(tmp_path) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_held_out_loss_that_is_no_number_is_divergence(value: str, tiny_model: Path, tmp_path: Path) -> None:
    def inject() -> None:
        from finetune_trainer.evaluation.evaluator import Evaluator

        original, calls = Evaluator.evaluate, []

        def evaluate(self: Any, *args: Any) -> dict[str, float]:
            calls.append(1)
            return original(self, *args) if len(calls) < 3 else {"evalLoss": float(value)}

        Evaluator.evaluate = evaluate

    finished = TrainerProcess(job(tmp_path, tiny_model), tmp_path, before=inject).finish()
    assert finished.exit_code == ExitCode.DIVERGED, finished.log
    assert "evalLoss is NaN or infinite at step 6" in finished.message
    assert _saved(tmp_path) == ["step-00000002", "step-00000004"]
    assert not (tmp_path / "out/manifest.json").exists()


def test_an_adapter_whose_loss_is_no_number_is_not_published(tiny_model: Path, tmp_path: Path) -> None:
    def inject() -> None:
        from finetune_trainer.evaluation.evaluator import Evaluator

        Evaluator.loss_of = lambda *args, **options: float("nan")

    finished = TrainerProcess(job(tmp_path, tiny_model), tmp_path, before=inject).finish()
    assert finished.exit_code == ExitCode.DIVERGED, finished.log
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]
