"""What happens at the Trainer's step boundaries: reporting, checkpoints, early stopping, keeping the best, stopping."""

import math
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.checkpoints.state import TrainingState
from finetune_trainer.errors import Diverged
from finetune_trainer.model.adapter import save_adapter
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.runtime.rng import RngState
from finetune_trainer.runtime.signals import StopFlag
from finetune_trainer.training.throughput import Throughput

log = structlog.get_logger(__name__)
#: Sends a saved checkpoint to the store: (folder, step).
Upload = Callable[[Path, int], None]
#: Hears of every recorded line: (step, values).
Tracker = Callable[[int, Mapping[str, Any]], None]


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps `state` (what a checkpoint remembers) and the report current; decides when to stop."""

    def __init__(
        self,
        *,
        spec: FineTuneJobSpec,
        state: TrainingState,
        folder: RunDirectory,
        reporter: Reporter,
        meter: Throughput,
        stop: StopFlag,
        upload: Upload,
        track: Tracker,
    ) -> None:
        self.spec = spec
        self.run = state
        self.folder = folder
        self.reporter = reporter
        self.meter = meter
        self.stop = stop
        self.upload = upload
        self.track = track
        self.trainer: Any = None  # set once it exists
        self.preempted = False
        self.stopped_early = False
        self._rng_at_step_end: RngState | None = None
        self._loss_at_step_begin: torch.Tensor | None = None  # only while a step is under way
        self._before = (state.tokens, state.train_seconds)

    # Reporting

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.model.train()  # once, for it goes through all modules; what leaves the mode also comes back to it
        # Steps since the last log line belong to the next one's average, also across a restart.
        if state.global_step:
            self.trainer._tr_loss += self.run.loss_since_log
            self.trainer._globalstep_last_logged = self.run.last_logged_step
        self.reporter.progress(step=state.global_step, total_steps=state.max_steps)
        self.meter.start()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        tokens, seconds, steps = self.meter.lap()
        tokens = self._over_processes(tokens)
        rate = tokens / seconds if seconds else None
        values = {
            "loss": logs["loss"],
            "learningRate": logs["learning_rate"],
            "gradNorm": logs.get("grad_norm"),
            "epoch": round(state.epoch or 0.0, 6),
            "tokensPerSecond": round(rate, 1) if rate else None,
        }
        values = {key: value for key, value in values.items() if value is not None}
        self.run.metrics["trainLoss"] = logs["loss"]
        self.reporter.metrics({"trainLoss": logs["loss"]})
        self.reporter.progress(
            step=state.global_step,
            total_steps=state.max_steps,
            seconds_per_step=seconds / steps if steps else None,
            epoch=values["epoch"],
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            tokens_per_second=values.get("tokensPerSecond"),
        )
        self._record(state.global_step, values, tokens=tokens, secondsPerStep=seconds / steps if steps else None)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        if not math.isfinite(metrics["evalLoss"]):
            raise Diverged(f"evalLoss is NaN or infinite at step {state.global_step}; the checkpoint before it is kept")
        self.run.evaluation_due = False
        self.run.metrics |= metrics
        self._record(state.global_step, metrics)
        self.reporter.metrics(metrics)
        self.reporter.progress(step=state.global_step, total_steps=state.max_steps, eval_loss=metrics["evalLoss"])
        self._judge(state, control, metrics)

    def _record(self, step: int, values: dict[str, Any], **timing: float | None) -> None:
        """`timing` is tracked, and not written to metrics.jsonl, which is the same for the same run."""
        if not self.trainer.is_world_process_zero():
            return
        self.folder.record(step=step, time=datetime.now(UTC).isoformat(timespec="seconds"), **values)
        self.track(step, {**values, **timing})
        shown = {key: f"{value:.6g}" for key, value in values.items() if "." not in key}
        log.info(f"Step {step}", **shown)

    # Keeping the best, stopping early

    def _judge(self, state: TrainerState, control: TrainerControl, metrics: dict[str, float]) -> None:
        stopping = self.spec.evaluation.early_stopping
        metric = stopping.metric if stopping else "evalLoss"
        value, run = metrics[metric], self.run
        if better(value, run.best.get(metric), metric):
            run.best, run.best_step = dict(run.metrics), state.global_step
            if self.spec.evaluation.keep_best and self.trainer.is_world_process_zero():
                shutil.rmtree(self.folder.best, ignore_errors=True)
                save_adapter(self.trainer.model, self.folder.best)
        if stopping is None:
            return
        if better(value, run.value_to_beat, metric, stopping.min_delta):
            run.value_to_beat, run.evaluations_without_gain = value, 0
            return
        run.evaluations_without_gain += 1
        if run.evaluations_without_gain >= stopping.patience:
            log.info(f"Stopping early: {metric} has not improved in {stopping.patience} evaluations")
            self.stopped_early = control.should_training_stop = control.should_save = True

    # Stopping and saving

    def on_pre_optimizer_step(self, *args: Any, **_: Any) -> None:
        self.trainer.at_step_boundary = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.at_step_boundary = True
        self.trainer.note_gradient()
        self._loss_at_step_begin, self._rng_at_step_end = None, RngState.now()
        self.meter.steps += 1
        self.meter.mark()
        self.reporter.progress(step=state.global_step, total_steps=state.max_steps)
        last = state.global_step >= state.max_steps
        due = last or state.global_step % self.spec.evaluation.every_steps == 0
        control.should_evaluate = due and self.spec.dataset.eval is not None
        self.run.evaluation_due = control.should_evaluate  # until it is done, by whichever attempt
        if last:
            control.should_log = True
        elif self.trainer.agreed_to_stop():
            self.preempt(state, control)

    def preempt(self, state: TrainerState, control: TrainerControl) -> None:
        """Leave the loop after saving the present step, without an evaluation: the next attempt begins with it."""
        log.info(f"Asked to stop ({self.stop.reason or 'another process'}): saving step {state.global_step}")
        self.preempted = control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._loss_at_step_begin = self.trainer._tr_loss.clone()

    def rewind(self) -> None:
        """Go back to the last step boundary, after what followed it was given up or has failed."""
        self.meter.rewind()
        if self._loss_at_step_begin is not None:
            self.trainer._tr_loss = self._loss_at_step_begin
        if self._rng_at_step_end is not None:
            self._rng_at_step_end.put_back()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        with self.meter.paused():
            self._complete(state)
            if self.trainer.is_world_process_zero():
                folder = self.folder.checkpoint(state.global_step)
                self.folder.add_to_checkpoint(folder, self.run)
                self.upload(folder, state.global_step)

    def _complete(self, state: TrainerState) -> None:
        """Bring `run` up to this step boundary."""
        run = self.run
        run.step = state.global_step
        run.finished = state.global_step >= state.max_steps or self.stopped_early
        run.tokens = self._before[0] + self._over_processes(self.meter.tokens)
        run.train_seconds = self._before[1] + self.meter.seconds
        run.loss_since_log = self._mean_over_processes(self.trainer._tr_loss)
        run.last_logged_step = self.trainer._globalstep_last_logged

    def _over_processes(self, value: int) -> int:
        if self.trainer.args.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self.trainer.args.device)
        torch.distributed.all_reduce(tensor)
        return int(tensor)

    def _mean_over_processes(self, value: torch.Tensor) -> float:
        if self.trainer.args.world_size == 1:
            return float(value)
        total = value.clone()
        torch.distributed.all_reduce(total)
        return float(total) / self.trainer.args.world_size


def better(value: float, best: float | None, metric: str, min_delta: float = 0.0) -> bool:
    """Whether `value` improves on `best` by more than `min_delta`. evalLoss should fall, everything else rise."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if metric == "evalLoss" else value > best + min_delta
