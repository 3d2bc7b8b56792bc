"""Asked to stop, a trainer is gone soon, wherever it is, and nothing is lost. Slowness is simulated."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from finetune_api.exit_codes import ExitCode
from finetune_trainer.evaluation.decoding import STRIDE
from support.trainer.process import (
    Finished,
    TrainerProcess,
    job,
    metrics_lines,
    train,
)

#: Eight rows a step in eight passes, over two epochs of five steps.
RUN: dict[str, Any] = {
    "training.maxSteps": 10,
    "training.batchSize": 8,
    "training.microBatchSize": 1,
    "lora.dropout": 0.1,
    "evaluation.everySteps": 4,
    "checkpoint.everySteps": 100,
    "logging.everySteps": 3,
}


def _stop_in_pass(step: int, number: int, log: Path) -> Callable[[], None]:
    """SIGTERM in the n-th forward pass of `step`. `log` gets a line for each pass from there on."""

    def inject() -> None:
        from finetune_trainer.training.loop import QloraTrainer

        original, passes = QloraTrainer.compute_loss, []

        def compute_loss(self: Any, *args: Any, **options: Any) -> Any:
            if self.state.global_step + 1 >= step:
                passes.append(1)
            if len(passes) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            if len(passes) >= number:
                log.write_text("pass\n" * (len(passes) - number + 1))
            return original(self, *args, **options)

        QloraTrainer.compute_loss = compute_loss

    return inject


def _same(one: Path, other: Path) -> bool:
    weights = [(folder / "out/adapter_model.safetensors").read_bytes() for folder in (one, other)]
    return metrics_lines(one / "out") == metrics_lines(other / "out") and weights[0] == weights[1]


@pytest.fixture(scope="module")
def unbroken(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    finished = train(job(folder, tiny_model, RUN), folder)
    assert finished.exit_code == 0, finished.log
    return folder


@pytest.mark.parametrize(("step", "number"), [(1, 3), (3, 8), (6, 1), pytest.param(9, 2, marks=pytest.mark.nightly)])
def test_a_step_under_way_is_given_up_and_the_one_before_saved(
    step: int, number: int, unbroken: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The sixth step is the first of an epoch, whose order of rows was drawn before it began."""
    config = job(tmp_path, tiny_model, RUN)
    log = tmp_path / "passes"
    stopped = TrainerProcess(config, tmp_path, before=_stop_in_pass(step, number, log)).finish()
    assert stopped.exit_code == ExitCode.PREEMPTED, stopped.log
    assert log.read_text().count("pass") == 1, "no pass was begun after the signal"
    # In the last pass of a step the step is as good as done.
    saved = step if number == 8 else step - 1
    assert (f"step {saved} is saved" if saved else "before the first step; nothing is lost") in stopped.message
    finished = train(config, tmp_path)
    assert finished.exit_code == 0, finished.log
    assert _same(tmp_path, unbroken)


def test_an_answer_being_generated_is_given_up(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "tokens"

    def stop_at_a_token() -> None:
        from finetune_trainer.evaluation import decoding

        original, tokens = decoding._step, []

        def step(*args: Any) -> None:
            tokens.append(1)
            if len(tokens) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            if len(tokens) >= 5:
                log.write_text("token\n" * (len(tokens) - 4))
            original(*args)

        decoding._step = step

    answers = {"evaluation.generation": {"maxNewTokens": 200}, "evaluation.onStart": False}
    config = job(tmp_path, tiny_model, RUN | {"evaluation.metrics": ["loss", "nli"]} | answers)
    stopped = TrainerProcess(config, tmp_path, before=stop_at_a_token).finish()
    assert stopped.exit_code == ExitCode.PREEMPTED, stopped.log
    assert "step 4 is saved" in stopped.message
    assert log.read_text().count("token") <= STRIDE, "the stop is seen at the next look"


def _stop_in(target: str, hang: Callable[[], None]) -> Callable[[], None]:
    """SIGTERM, and then `hang`, in the place of `target`."""

    def inject() -> None:
        def work(*args: Any, **options: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            hang()

        owner, _, name = target.rpartition(".")
        setattr(resolve_name(f"finetune_trainer.{owner}"), name, work)

    return inject


def _long() -> None:
    """Work that takes a while, in a library that takes every error for its own."""
    for _ in range(10_000):
        try:
            time.sleep(0.01)
        except Exception:
            continue


@pytest.mark.parametrize(
    "target",
    [
        "run.read_rows",
        "run.tokenize",
        "publishing.publish.AdapterOutput.find_published",
        "steps.load_base_model",
    ],
)
def test_before_training_there_is_nothing_to_wait_for(target: str, tiny_model: Path, tmp_path: Path) -> None:
    config = job(tmp_path, tiny_model, RUN)
    stopped = TrainerProcess(config, tmp_path, before=_stop_in(target, _long)).finish()
    _assert_stopped(stopped)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("target", ["steps.write_bundle", "publishing.publish._confirm", "publishing.verify._fetch"])
def test_after_training_the_next_attempt_publishes(
    target: str, unbroken: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = job(tmp_path, tiny_model, RUN, uid="1234")
    _assert_stopped(TrainerProcess(config, tmp_path, before=_stop_in(target, _long)).finish())
    assert (tmp_path / "out/manifest.json").exists() == (target == "publishing.publish._confirm")
    finished = train(config, tmp_path)
    assert finished.exit_code == 0, finished.log
    assert '"event": "Step ' not in finished.log
    assert _same(tmp_path, unbroken)


def test_what_hangs_on_leaving_is_left(tiny_model: Path, tmp_path: Path) -> None:
    def inject() -> None:
        from finetune_trainer import steps
        from finetune_trainer.runtime import signals

        def stop_and_wait_for_a_thread(*args: Any, **options: Any) -> None:
            with ThreadPoolExecutor() as pool:
                pool.submit(time.sleep, 1000)
                os.kill(os.getpid(), signal.SIGTERM)

        signals.TIMEOUT = 0.2
        steps.load_base_model = stop_and_wait_for_a_thread

    stopped = TrainerProcess(job(tmp_path, tiny_model, RUN), tmp_path, before=inject).finish()
    _assert_stopped(stopped)
    assert stopped.message == "Forced exit after the grace period; saved checkpoints are intact"


def _assert_stopped(stopped: Finished) -> None:
    assert stopped.exit_code == ExitCode.PREEMPTED, stopped.log
    assert stopped.report["reason"] == "Preempted"
    assert stopped.message.startswith(("Asked to stop", "Stopped by SIG", "Forced exit"))
    assert "Traceback" not in stopped.log
