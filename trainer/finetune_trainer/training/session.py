"""The training loop: transformers' arguments from the spec, resume, and smaller micro-batches after out-of-memory."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers import PrinterCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.checkpoints.state import TrainingState
from finetune_trainer.data import batching
from finetune_trainer.data.batching import Collate, Loader, ProcessBatches
from finetune_trainer.data.dataset import TokenizedDataset
from finetune_trainer.engine.compilation import apply_plan
from finetune_trainer.engine.lora import clear_cache, inputs_of, share_lora_inputs
from finetune_trainer.engine.optimizer import unpaged
from finetune_trainer.errors import GpuOutOfMemory, Preempted, is_gpu_out_of_memory
from finetune_trainer.evaluation.evaluator import Evaluator
from finetune_trainer.model.adapter import load_adapter_weights
from finetune_trainer.planning.memory import ModelShape, selective_budget
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.runtime.signals import StopFlag
from finetune_trainer.training.hooks import RunCallback, Tracker, Upload
from finetune_trainer.training.loop import QloraTrainer, StepAborted
from finetune_trainer.training.throughput import Throughput

log = structlog.get_logger(__name__)


@dataclass
class Training:
    """All that one training needs; `run` trains `model` in place."""

    spec: FineTuneJobSpec
    plan: ExecutionPlan
    shape: ModelShape | None
    model: Any
    tokenizer: Any
    rows: TokenizedDataset
    evaluator: Evaluator | None
    state: TrainingState
    folder: RunDirectory
    reporter: Reporter
    stop: StopFlag
    upload: Upload
    track: Tracker = lambda step, values: None
    on_out_of_memory: Callable[[], None] = lambda: None
    initial: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    has_trained: bool = field(default=False, init=False)
    """Whether this process has done steps of its own: its peak of memory tells something only then."""

    def run(self, checkpoint: Path | None) -> ExecutionPlan:
        """Train to the end, from `checkpoint` if given; returns the plan in use at the end.

        Raises Preempted once the checkpoint is safe, Diverged, and GpuOutOfMemory when no smaller micro-batch is left.
        """
        self.initial = snapshot(self.model)
        share_lora_inputs(self.model)
        budget = selective_budget(self.shape, self.spec, self.plan.tokens_per_pass or 1) if self.shape else 1.0
        example = self._loader().example()
        self.plan = apply_plan(self.plan, self.model, example, self.spec.training.precision, budget)
        self.reporter.plan(self.plan)
        while True:
            trainer, callback = self._trainer()
            clear_cache(inputs_of(self.model))
            _free_memory()
            try:
                self._train(trainer, callback, checkpoint)
            except StepAborted:
                self._save_boundary(trainer, callback)
                raise self._preempted() from None
            except Exception as error:
                if not is_gpu_out_of_memory(error):
                    raise
                self.plan = self._smaller(error)
                checkpoint = self._last_good(trainer, callback)
                del trainer, callback, error
                continue
            if callback.preempted:
                raise self._preempted()
            return self.plan

    def _train(self, trainer: QloraTrainer, callback: RunCallback, checkpoint: Path | None) -> None:
        """From `checkpoint` on: the evaluation that was due there, then the steps that are left."""
        if checkpoint and self.state.evaluation_due:
            self._evaluate_at(trainer, checkpoint)
            if callback.preempted:
                return
            self.state.finished |= callback.stopped_early
        if checkpoint and self.state.finished:
            log.info(f"Training had ended at step {self.state.step}; what is left is to publish")
            load_adapter_weights(self.model, checkpoint)
            self.reporter.progress(step=self.state.step, total_steps=self.state.step)
            return
        self.has_trained = True
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _evaluate_at(self, trainer: QloraTrainer, checkpoint: Path) -> None:
        """The evaluation that an earlier attempt gave up, or died in, at the step of `checkpoint`."""
        log.info(f"An evaluation is due at step {self.state.step}")
        load_adapter_weights(self.model, checkpoint)
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        trainer.evaluate()

    def _preempted(self) -> Preempted:
        saved = f"step {self.state.step} is saved" if self.state.step else "before the first step; nothing is lost"
        return Preempted(f"Asked to stop ({self.stop.reason or 'another process'}); {saved}")

    def _trainer(self) -> tuple[QloraTrainer, RunCallback]:
        meter = Throughput()
        callback = RunCallback(
            spec=self.spec,
            state=self.state,
            folder=self.folder,
            reporter=self.reporter,
            meter=meter,
            stop=self.stop,
            upload=self.upload,
            track=self.track,
        )
        trainer = QloraTrainer(
            model=self.model,
            args=arguments(self.spec, self.plan, self.folder.checkpoints, self.model),
            train_dataset=self.rows.dataset(),
            loader=self._loader(),
            eval_dataset=None,
            processing_class=self.tokenizer,
            callbacks=[callback],
            evaluator=self.evaluator,
            meter=meter,
        )
        trainer.remove_callback(PrinterCallback)
        callback.trainer = trainer
        trainer.asked_to_stop = lambda: bool(self.stop)
        trainer.on_interrupted = lambda: callback.preempt(trainer.state, trainer.control)
        if (self.plan.world_size or 1) == 1:  # several processes can only leave at a step's end, together
            trainer.give_up = trainer.asked_to_stop
        return trainer, callback

    def _loader(self) -> Loader:
        lengths = self.rows.input_ids.lengths
        steps = batching.of(self.spec, lengths, self.plan)
        rank = torch.distributed.get_rank() if steps.world > 1 else 0
        collate = Collate(steps.packed, self.tokenizer.pad_token_id, steps.micro_batch, max(lengths))
        return Loader(self.rows, ProcessBatches(steps, rank), collate, pinned=self.model.device.type == "cuda")

    def _smaller(self, error: BaseException) -> ExecutionPlan:
        plan = self.plan
        micro = plan.micro_batch_size or 1
        world = plan.world_size or 1
        if micro == 1:
            uncached = " quantization.cachedLayers: 0 or" if plan.cached_layers else ""
            raise GpuOutOfMemory(
                f"The GPU ran out of memory at micro-batch 1: lower training.maxLength, set{uncached}"
                " training.gradientCheckpointing: enabled, or take a larger GPU"
            ) from error
        if self.spec.recovery.on_out_of_memory == "Fail" or world > 1:
            raise GpuOutOfMemory(f"The GPU ran out of memory at micro-batch {micro}") from error
        share = micro * (plan.gradient_accumulation_steps or 1)
        smaller = next(size for size in range(micro // 2, 0, -1) if share % size == 0)
        log.warning(f"The GPU ran out of memory at micro-batch {micro}: going on with {smaller}, same effective batch")
        self.on_out_of_memory()
        plan = plan.model_copy(update={"micro_batch_size": smaller, "gradient_accumulation_steps": share // smaller})
        most = batching.of(self.spec, self.rows.input_ids.lengths, plan).most_tokens
        plan = plan.model_copy(update={"tokens_per_pass": most})
        self.reporter.plan(plan)
        return plan

    def _last_good(self, trainer: QloraTrainer, callback: RunCallback) -> Path | None:
        """Go back to the last state that is whole: this step's start, else a checkpoint, else the very beginning."""
        trainer.model.zero_grad(set_to_none=True)
        if trainer.at_step_boundary:
            self._save_boundary(trainer, callback)
        if self.state.step:
            checkpoint = self.folder.checkpoint(self.state.step)
            self.state = self.folder.take_from_checkpoint(checkpoint)
            return checkpoint
        restore(trainer.model, self.initial)
        self.state = TrainingState(fingerprint=self.state.fingerprint, before=self.state.before)
        self.folder.keep_steps(0)
        return None

    def _save_boundary(self, trainer: QloraTrainer, callback: RunCallback) -> None:
        """Save the step that was done last, unless that is saved already."""
        if trainer.state.global_step > self.state.step:
            callback.rewind()
            trainer.save_now()


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    """A copy, in host memory, of the weights that train."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def restore(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put the weights of a snapshot back."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def arguments(spec: FineTuneJobSpec, plan: ExecutionPlan, folder: Path, model: Any) -> SFTConfig:
    """transformers' and TRL's arguments to train `model` for `spec`, laid out as `plan` says."""
    training, on_cpu = spec.training, model.device.type == "cpu"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_ratio if training.scheduler != "constant" else 0,
        weight_decay=training.weight_decay,
        optim=unpaged(training.optimizer, trained),
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        bf16=training.precision in ("bf16", "fp8"),
        fp16=training.precision == "fp16",
        tf32=None,
        gradient_checkpointing=False,  # engine.layers does it, layer by layer
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_strategy="steps",
        logging_steps=spec.logging.every_steps,
        logging_nan_inf_filter=False,
        eval_strategy="no",  # our callback asks for evaluations
        save_strategy="steps",
        save_steps=spec.checkpoint.every_steps,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and (plan.world_size or 1) > 1 else None,
        dataloader_pin_memory=not on_cpu,
    )


def _free_memory() -> None:
    """Give back what loading, an evaluation or a failed try has left, and measure the peak of memory anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
