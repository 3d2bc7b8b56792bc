"""What happens around a training step: reporting, evaluation, checkpoints, stopping.

transformers calls `on_*` (TrainerCallback); QloraTrainer calls the rest. The numbers that a checkpoint must hold are in
TrainingState; what is here is forgotten with the process.
"""

import math
import shutil
from pathlib import Path
from typing import Any, Final, Protocol

import structlog
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_trainer.checkpoints.state import TrainingState
from finetune_trainer.context import RunContext
from finetune_trainer.errors import Diverged
from finetune_trainer.evaluation import answers
from finetune_trainer.evaluation.evaluator import Evaluator
from finetune_trainer.evaluation.lockstep import EvaluationAborted
from finetune_trainer.methods.base import Method
from finetune_trainer.model.adapter import save_adapter
from finetune_trainer.runtime.distributed import all_reduce_sum, gather_files
from finetune_trainer.runtime.rng import RngState
from finetune_trainer.training.best import judge
from finetune_trainer.training.finite import FiniteCheck
from finetune_trainer.training.step_batches import StepBatches
from finetune_trainer.training.throughput import Throughput

log = structlog.get_logger(__name__)
#: fp16's loss scale starts at 2^16 and halves with each step whose gradients overflow: after 17 it is below 1, and the
#: gradients are infinite whatever the scale.
_MAX_SKIPPED_STEPS: Final = 17


class StepAborted(Exception):
    """A step was abandoned between two of its micro-batches, because the process must stop."""


class Upload(Protocol):
    """Sends the checkpoint of a step to the store."""

    def __call__(self, folder: Path, step: int) -> None: ...


class TrainingHooks(TrainerCallback):  # type: ignore[misc]
    """Keeps `run`, which a checkpoint remembers, and the report current; decides when to stop."""

    def __init__(
        self,
        ctx: RunContext,
        *,
        run: TrainingState,
        model: Any,
        method: Method,
        batches: StepBatches,
        throughput: Throughput,
        evaluator: Evaluator | None,
        upload: Upload,
    ) -> None:
        self.run = run
        self.run.outperformed = ""  # it trains on
        self.preempted = False
        self.stopped_early = False
        #: Whether the weights are those of a whole number of steps: false while the optimizer works.
        self.at_step_boundary = True
        #: Norm of the step's gradient before clipping, set by QloraTrainer.
        self.gradient_norm: Any = None
        self._ctx = ctx
        self._model = model
        self._method = method
        self._batches = batches
        self._throughput = throughput
        self._evaluator = evaluator
        self._upload = upload
        self._finite = FiniteCheck(ctx.ranks)
        self._skipped_steps = 0
        self._earlier = (run.tokens, run.train_seconds)
        self._loss = torch.tensor(run.loss_since_log)  # summed since the last log line
        self._loss_at_step_begin: torch.Tensor | None = None  # only while a step is under way
        self._rng_at_step_end: RngState | None = None

    # Around a micro-batch

    def before_micro_batch(self) -> None:
        """Raise StepAborted when this process must stop. Several ranks leave together, at a step's end."""
        if self._ctx.ranks.size == 1 and self._ctx.stop:
            raise StepAborted

    def after_micro_batch(self, loss: torch.Tensor, step: int) -> None:
        """Add `loss`, a scalar on the device, to the step's."""
        self._finite.note(loss, step)
        self._loss += loss

    # Around a step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._model.train()  # Call train() once: it walks all modules, and eval blocks restore it.
        self._loss = torch.tensor(self.run.loss_since_log, device=args.device)
        self._ctx.report.progress(step=state.global_step, total_steps=state.max_steps)
        self._throughput.start()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._loss_at_step_begin = self._loss.clone()

    def on_pre_optimizer_step(self, *args: Any, **_: Any) -> None:
        self.at_step_boundary = False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Any, **_: Any
    ) -> None:
        """Note a bad gradient: a loss can be finite where that is not.

        fp16 skips a step now and then to find its loss scale; a run that only skips would never learn anything.
        """
        skipped = optimizer.step_was_skipped
        self._skipped_steps = self._skipped_steps + 1 if skipped else 0
        searching = skipped and self._skipped_steps < min(_MAX_SKIPPED_STEPS, state.max_steps)
        if self.gradient_norm is not None and not searching:
            self._finite.note(torch.as_tensor(self.gradient_norm), state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.at_step_boundary = True
        self._loss_at_step_begin, self._rng_at_step_end = None, RngState.now()
        self._throughput.steps += 1
        self._throughput.snapshot()
        if self._ctx.ranks.is_main and not self._ctx.clock.told:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # once: the device may not be through with the step
            self._ctx.clock.tell()
        self._ctx.report.progress(step=state.global_step, total_steps=state.max_steps)
        last = state.global_step >= state.max_steps
        due = last or state.global_step % self._ctx.spec.evaluation.every_steps == 0
        control.should_evaluate = due and self._evaluator is not None
        self.run.evaluation_due = control.should_evaluate  # until it is done, by whichever attempt
        if last:
            control.should_log = True
        elif self._batches.agreed_to_stop():
            self.preempt(state, control)
        if control.should_log:
            self._finite.check(state.global_step)

    def rewind(self) -> None:
        """Return to the last step boundary after the step that followed it failed or was abandoned."""
        self._throughput.rewind()
        if self._loss_at_step_begin is not None:
            self._loss = self._loss_at_step_begin
        if self._rng_at_step_end is not None:
            self._rng_at_step_end.restore()

    def preempt(self, state: TrainerState, control: TrainerControl) -> None:
        """Leave the loop after saving the present step, without an evaluation: the next attempt begins with it."""
        control.should_save = state.global_step > self.run.step
        does = f"saving step {state.global_step}" if control.should_save else f"step {state.global_step} is saved"
        log.info(f"Stop requested ({self._ctx.stop_reason}): {does}")
        self.preempted = control.should_training_stop = True
        control.should_evaluate = False

    # Reporting

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        loss = self._mean_loss() / (state.global_step - self.run.last_logged_step)
        self._loss, self.run.last_logged_step = torch.zeros_like(self._loss), state.global_step
        state.log_history[-1]["loss"] = loss  # transformers averages over the steps since a resume only
        tokens, seconds, steps = self._throughput.interval()
        tokens = all_reduce_sum(self._ctx.ranks, tokens)
        rate = tokens / seconds if seconds else None
        values = {
            "loss": loss,
            "learningRate": logs["learning_rate"],
            "gradNorm": logs.get("grad_norm"),
            "epoch": round(state.epoch or 0.0, 6),
            "tokensPerSecond": round(rate, 1) if rate else None,
        }
        values = {key: value for key, value in values.items() if value is not None}
        self.run.metrics["trainLoss"] = loss
        self._ctx.report.metrics({"trainLoss": loss})
        self._ctx.report.progress(
            step=state.global_step,
            total_steps=state.max_steps,
            seconds_per_step=seconds / steps if steps else None,
            epoch=values["epoch"],
            loss=loss,
            learning_rate=logs["learning_rate"],
            tokens_per_second=values.get("tokensPerSecond"),
        )
        self._record(state.global_step, values, tokens=tokens, secondsPerStep=seconds / steps if steps else None)

    def _record(self, step: int, values: dict[str, Any], **timing: float | None) -> None:
        """Record one line. `timing` reaches trackers but not metrics.jsonl, which is the same for the same run."""
        if not self._ctx.ranks.is_main:
            return
        self._ctx.metrics.log(step, values, timing)
        shown = {key: f"{value:.6g}" for key, value in values.items() if "." not in key}
        log.info(f"Step {step}", **shown)

    # Evaluation

    def evaluate(self, state: TrainerState, control: TrainerControl) -> dict[str, float]:
        """Return the metrics of the model as it is; none, after asking to stop, when a stop interrupted it."""
        assert self._evaluator is not None
        self._finite.check(state.global_step)
        with self._throughput.paused():
            try:
                return self._evaluator.evaluate(self._model)
            except EvaluationAborted:
                self.preempt(state, control)
                return {}

    def is_compared(self, state: TrainerState, metrics: dict[str, float]) -> bool:
        """Return whether the run is to wait for others at this step, and to be compared with them."""
        at_rung = self._ctx.sharing.is_rung(state.global_step) and state.global_step < state.max_steps
        return at_rung and math.isfinite(metrics["evalLoss"])

    def compare(self, state: TrainerState, control: TrainerControl, metrics: dict[str, float]) -> dict[str, float]:
        """Wait for the others and note whether the run fell behind; returns `metrics`, or none as `evaluate` does."""
        with self._throughput.paused():
            try:
                self.run.outperformed = self._ctx.sharing.why_stopped(state.global_step, metrics["evalLoss"])
                return metrics
            except EvaluationAborted:
                self.preempt(state, control)
                return {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        if not math.isfinite(metrics["evalLoss"]):
            raise Diverged(f"evalLoss is NaN or infinite at step {state.global_step}; the checkpoint before it is kept")
        self.run.evaluation_due = False
        self.run.metrics |= metrics
        self._record(state.global_step, metrics)
        self._ctx.report.metrics(metrics)
        self._ctx.report.progress(step=state.global_step, total_steps=state.max_steps, eval_loss=metrics["evalLoss"])
        evaluation = self._ctx.spec.evaluation
        is_best, stop = judge(self.run, metrics, step=state.global_step, evaluation=evaluation, method=self._method)
        if self._ctx.ranks.is_main and (is_best or not evaluation.keep_best):
            self._keep_answers()
        if is_best and evaluation.keep_best and self._ctx.ranks.is_main:
            shutil.rmtree(self._ctx.directory.best, ignore_errors=True)
            save_adapter(self._model, self._ctx.directory.best)
        if stop and evaluation.early_stopping:
            metric, patience = evaluation.early_stopping.metric, evaluation.early_stopping.patience
            log.info(f"Stopping early: {metric} has not improved in {patience} evaluations")
            self.stopped_early = control.should_training_stop = control.should_save = True

        if self.run.outperformed:
            control.should_training_stop = control.should_save = True

    def _keep_answers(self) -> None:
        """Write the answers of this evaluation to where they are published from."""
        if self._evaluator is not None and self._evaluator.answers:
            file = self._ctx.directory.answers_file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(answers.to_lines(self._evaluator.answers))

    # Saving

    def before_save(self, state: TrainerState) -> None:
        """Raise Diverged rather than save weights that are no numbers; stop the clock until the save is done."""
        norms = [weight.detach().norm() for weight in self._model.parameters() if weight.requires_grad]
        self._finite.note(torch.stack(norms).sum(), state.global_step)
        self._finite.check(state.global_step)
        self._throughput.stop()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._complete(state)
        ranks, folder = self._ctx.ranks, self._ctx.directory.checkpoint(state.global_step)
        gather_files(ranks, folder, f"rng_state_{ranks.rank}.pth")
        if ranks.is_main:
            self._ctx.directory.add_to_checkpoint(folder, self.run)
            self._upload(folder, state.global_step)
        self._throughput.start()

    def _complete(self, state: TrainerState) -> None:
        """Bring `run` up to this step boundary."""
        run, ranks = self.run, self._ctx.ranks
        run.step = state.global_step
        run.finished = state.global_step >= state.max_steps or self.stopped_early
        run.tokens = self._earlier[0] + all_reduce_sum(ranks, self._throughput.tokens)
        run.train_seconds = self._earlier[1] + self._throughput.seconds
        run.loss_since_log = self._mean_loss()

    def _mean_loss(self) -> float:
        """Return the loss summed since the last log line, as the mean over ranks."""
        ranks, total = self._ctx.ranks, self._loss
        if ranks.size > 1:
            total = total.clone()
            torch.distributed.all_reduce(total)
        return float(total) / ranks.size
