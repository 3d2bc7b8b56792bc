"""One training: resume, the steps, and smaller micro-batches after the GPU ran out of memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from finetune_api.status import ExecutionPlan
from finetune_trainer.checkpoints.manager import CheckpointManager
from finetune_trainer.checkpoints.state import TrainingState
from finetune_trainer.context import RunContext
from finetune_trainer.data.batching import Loader, ProcessBatches, Steps
from finetune_trainer.data.dataset import Datasets
from finetune_trainer.engine.compilation import compile_layers
from finetune_trainer.engine.lora import clear_cache, shared_lora_inputs
from finetune_trainer.errors import GpuOutOfMemory, Outperformed, Preempted, WontFit, is_gpu_out_of_memory
from finetune_trainer.evaluation.evaluator import EvalPrompt, Evaluator
from finetune_trainer.evaluation.lockstep import EvaluationAborted
from finetune_trainer.methods.base import Method
from finetune_trainer.model.adapter import load_adapter_weights
from finetune_trainer.model.base import BaseModel
from finetune_trainer.planning.memory import selective_budget
from finetune_trainer.planning.tuning import pays
from finetune_trainer.runtime.patches import tune_tiles
from finetune_trainer.runtime.peak_memory import peak, release_memory
from finetune_trainer.sharing import Place
from finetune_trainer.training.arguments import training_arguments
from finetune_trainer.training.baseline import measured_or_kept
from finetune_trainer.training.hooks import StepAborted, TrainingHooks
from finetune_trainer.training.loop import QloraTrainer
from finetune_trainer.training.packed_loop import PackedTrainer
from finetune_trainer.training.step_batches import StepBatches
from finetune_trainer.training.throughput import Throughput

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """How training ended.

    Attributes:
        state: The state of the last checkpoint.
        plan: The plan in use at the end, with measured memory if this process trained.
    """

    state: TrainingState
    plan: ExecutionPlan


@dataclass
class TrainingSession:
    """Trains `model` in place; retries with a smaller micro-batch after the GPU ran out of memory.

    Attributes:
        ctx: The run.
        method: What is minimized.
        plan: How the run is laid out; `fit` may replace it.
        base: The base model: its shape, and the tokenizer that TRL asks for.
        model: The PEFT model.
        data: The training rows, and the held-out rows if there are any.
        prompts: Held-out rows to answer.
        checkpoints: Where checkpoints go.
        place: Where micro-batches meet those of other trials; None trains `model` by itself.
        evaluator: Measures the held-out rows, the training rows where there are none.
        has_trained: Whether this process has trained: its peak of memory tells something only then.
    """

    ctx: RunContext
    method: Method
    plan: ExecutionPlan
    base: BaseModel
    model: Any
    data: Datasets
    prompts: Sequence[EvalPrompt]
    checkpoints: CheckpointManager
    place: Place | None = None
    evaluator: Evaluator = field(init=False)
    has_trained: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        spec, ranks, rows = self.ctx.spec, self.ctx.ranks, self.data.eval or self.data.train
        self.evaluator = Evaluator(
            spec, self.method, self.plan, self.base.tokenizer, ranks, rows, self.prompts, self.ctx.is_stopping
        )
        if self.place:
            self.plan = self.place.plan

    def measure_baseline(self, state: TrainingState) -> None:
        """Measure the base model, and keep the metrics in `state`. Raises Preempted."""
        with self.ctx.stage("Evaluating", "Measuring the base model before training"):
            rows = self.data.eval or self.data.train
            measure = partial(
                measured_or_kept, self.ctx, self.evaluator, self.model, self.plan, self.base, rows, self.prompts
            )
            # The same for all trials of a process that begin with the same weights.
            begun_with = ("baseline", self.ctx.spec.lora.init_from)
            try:
                state.before = dict(self.ctx.sharing.once(begun_with, measure))
            except EvaluationAborted:
                raise self.ctx.preempted() from None
            self.ctx.report.metrics(state.metrics_before())
            if self.ctx.ranks.is_main:
                self.ctx.metrics.log_baseline(state.before)

    def compile(self) -> None:
        """Checkpoint and compile the layers as the plan says; the plan becomes what is in effect."""
        shape = self.base.shape
        budget = selective_budget(shape, self.ctx.spec, self.plan.tokens_per_pass or 1) if shape else 1.0
        tuned = pays(self.ctx.spec.training, self.data.train.input_ids.lengths, shape)
        tune_tiles(tuned)
        example, precision = self._loader().example(), self.ctx.spec.training.precision
        self.plan = compile_layers(
            self.model, self.plan, example, precision, budget, one_graph=not tuned, ranks=self.ctx.ranks
        )
        self.ctx.report.plan(self.plan)
        self.ctx.clock.lap("compile")

    def fit(self, state: TrainingState, checkpoint: Path | None) -> TrainingResult:
        """Train to the end, from `checkpoint` if given, whose state is `state`.

        Raises:
            Preempted: The process was asked to stop, and the checkpoint is safe.
            Outperformed: The run fell behind the other trials of its process, and the checkpoint is safe.
            Diverged: The loss, a gradient or a weight became NaN or infinite.
            GpuOutOfMemory: No smaller micro-batch is left, or none may be tried.
            WontFit: No smaller one is left to a run that shares its process.
        """
        initial = snapshot(self.model)
        if self.place is None:
            self.compile()
        else:
            self.ctx.report.plan(self.plan)
        while True:
            trainer, hooks = self._trainer(state)
            clear_cache(shared_lora_inputs(self.model))
            release_memory()
            try:
                self._train(trainer, hooks, checkpoint)
            except StepAborted:
                _save_boundary(trainer, hooks)
                raise self._preempted(hooks.run) from None
            except Exception as error:
                if not is_gpu_out_of_memory(error):
                    raise
                if trainer.graphs:
                    trainer.graphs.clear()
                if hooks.run.outperformed:  # it was saving: no step is left that smaller micro-batches are for
                    hooks.rewind()
                    trainer.save_now()
                    raise Outperformed(hooks.run.outperformed) from None
                self.plan = self._smaller(error)
                state, checkpoint = self._last_good(trainer, hooks, initial)
                del trainer, hooks, error
                continue
            if hooks.preempted:
                raise self._preempted(hooks.run)
            if hooks.run.outperformed:
                raise Outperformed(hooks.run.outperformed)
            if trainer.graphs:
                self.plan = self.plan.model_copy(update={"captured": not trainer.graphs.problem})
                trainer.graphs.clear()
            plan = self._with_measured_memory() if self.has_trained else self.plan
            self.ctx.report.plan(plan)
            return TrainingResult(hooks.run, plan)

    def _train(self, trainer: QloraTrainer, hooks: TrainingHooks, checkpoint: Path | None) -> None:
        """Do the evaluation that was due at `checkpoint`, then the steps that are left."""
        state = hooks.run
        if checkpoint and state.evaluation_due:
            log.info(f"Evaluating at step {state.step}: an earlier attempt did not finish it")
            load_adapter_weights(self.model, checkpoint)
            trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            trainer.evaluate()
            if state.outperformed:  # the checkpoint at hand learns it, and what was measured
                self.ctx.directory.add_to_checkpoint(checkpoint, state)
                self.checkpoints.upload(checkpoint, state.step)
            if hooks.preempted or state.outperformed:
                return
            state.finished |= hooks.stopped_early
        if checkpoint and state.finished:
            log.info(f"Training is complete (step {state.step}); only publishing remains")
            load_adapter_weights(self.model, checkpoint)
            self.ctx.report.progress(step=state.step, total_steps=state.step)
            return
        self.has_trained = True  # also when it fails: a retry may find nothing left to train
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _preempted(self, state: TrainingState) -> Preempted:
        saved = f"step {state.step} is saved" if state.step else "before the first step; nothing is lost"
        return Preempted(f"Asked to stop ({self.ctx.stop_reason}); {saved}")

    def _trainer(self, state: TrainingState) -> tuple[QloraTrainer, TrainingHooks]:
        throughput = Throughput()
        batches = StepBatches(self._loader(), self.method, self.ctx.ranks, self.ctx.stop, throughput)
        hooks = TrainingHooks(
            self.ctx,
            run=state,
            model=self.model,
            method=self.method,
            batches=batches,
            throughput=throughput,
            evaluator=self.evaluator if self.data.eval else None,
            upload=self.checkpoints.upload,
        )
        make = partial(PackedTrainer, place=self.place) if self.place else QloraTrainer
        trainer = make(
            model=self.model,
            method=self.method,
            batches=batches,
            hooks=hooks,
            captured=self._captures and not self.plan.gradient_checkpointing,
            args=training_arguments(self.ctx.spec, self.plan, self.ctx.directory.checkpoints, self.model),
            train_dataset=self.data.train.dataset(),
            eval_dataset=None,
            processing_class=self.base.tokenizer,
        )
        return trainer, hooks

    @property
    def _captures(self) -> bool:
        """Whether this run replays its own passes as CUDA graphs; those it shares are the pack's."""
        return bool(self.plan.captured) and self.place is None

    def _loader(self) -> Loader:
        lengths = self.data.train.input_ids.lengths
        steps = Steps.from_plan(self.ctx.spec, lengths, self.plan)
        plan = self.plan.model_copy(update={"captured": self._captures})
        collate = self.method.collator(plan, self.base.tokenizer.pad_token_id, steps.micro_batch, max(lengths))
        pinned = self.model.device.type == "cuda"
        return Loader(self.data.train, ProcessBatches(steps, self.ctx.ranks.rank), collate, pinned)

    def _smaller(self, error: BaseException) -> ExecutionPlan:
        """Return the plan with a smaller micro-batch and the same effective batch. Raises GpuOutOfMemory."""
        plan = self.plan
        micro = plan.micro_batch_size or 1
        if self._captures and self.ctx.spec.recovery.on_out_of_memory != "Fail":
            log.warning("The GPU ran out of memory: retrying without CUDA graphs")
            return self._retried(plan.model_copy(update={"captured": False}))
        if micro == 1:
            uncached = " quantization.cachedLayers: 0 or" if plan.cached_layers else ""
            # Alone it has more room: no attempt of the process that it shares would give it that.
            raise (WontFit if self.place else GpuOutOfMemory)(
                f"The GPU ran out of memory at micro-batch 1: lower training.maxLength, set{uncached}"
                " training.gradientCheckpointing: enabled, or use a larger GPU"
            ) from error
        if self.ctx.spec.recovery.on_out_of_memory == "Fail" or self.ctx.ranks.size > 1:
            raise GpuOutOfMemory(f"The GPU ran out of memory at micro-batch {micro}") from error
        share = micro * (plan.gradient_accumulation_steps or 1)
        smaller = next(size for size in range(micro // 2, 0, -1) if share % size == 0)
        log.warning(f"The GPU ran out of memory at micro-batch {micro}: retrying with {smaller}, same effective batch")
        return self._retried(
            plan.model_copy(update={"micro_batch_size": smaller, "gradient_accumulation_steps": share // smaller})
        )

    def _retried(self, plan: ExecutionPlan) -> ExecutionPlan:
        """Return `plan` with its tokens counted anew, and report it."""
        self.ctx.telemetry.out_of_memory.inc()
        most = Steps.from_plan(self.ctx.spec, self.data.train.input_ids.lengths, plan).most_tokens
        plan = plan.model_copy(update={"tokens_per_pass": most})
        self.ctx.report.plan(plan)
        return plan

    def _last_good(
        self, trainer: QloraTrainer, hooks: TrainingHooks, initial: dict[str, torch.Tensor]
    ) -> tuple[TrainingState, Path | None]:
        """Return to the last whole state: this step's start, else a checkpoint, else the `initial` weights."""
        self.model.zero_grad(set_to_none=True)
        if hooks.at_step_boundary:
            _save_boundary(trainer, hooks)
        if hooks.run.step:
            checkpoint = self.ctx.directory.checkpoint(hooks.run.step)
            return self.ctx.directory.take_from_checkpoint(checkpoint), checkpoint
        restore(self.model, initial)
        self.ctx.directory.keep_steps(0)
        return TrainingState(fingerprint=hooks.run.fingerprint, before=hooks.run.before), None

    def _with_measured_memory(self) -> ExecutionPlan:
        if not torch.cuda.is_initialized():
            return self.plan
        return self.plan.model_copy(update={"measured_peak_memory_bytes": peak()})


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy, in host memory, of the weights that train."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


def restore(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put the weights of a snapshot back."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def _save_boundary(trainer: QloraTrainer, hooks: TrainingHooks) -> None:
    """Save the step that was done last, unless it is saved already."""
    if trainer.state.global_step > hooks.run.step:
        hooks.rewind()
        trainer.save_now()
