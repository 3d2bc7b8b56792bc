"""TRL's SFTTrainer, with what a run that must not be lost needs: exact resume, tokens counted, divergence noticed.

Its batches and its loss are the engine's: no row is padded needlessly, and within a step the host never waits for the
device.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerControl
from trl import SFTTrainer

from finetune_trainer.data.batching import Loader
from finetune_trainer.engine.gradients import GradientReducer
from finetune_trainer.engine.optimizer import fuse_updates
from finetune_trainer.errors import Diverged
from finetune_trainer.evaluation.evaluator import Evaluator
from finetune_trainer.model.adapter import load_adapter_weights, save_adapter
from finetune_trainer.runtime import distributed
from finetune_trainer.runtime.distributed import EvaluationAborted
from finetune_trainer.runtime.transfer import on_device
from finetune_trainer.training.throughput import Throughput

#: An fp16 loss scale begins at 2^16 and halves with each step whose gradients overflow: after so many it is below 1,
#: and the gradients are infinite whatever the scale.
_MOST_SKIPPED_STEPS: Final = 17


class StepAborted(Exception):
    """A step was given up between two of its micro-batches, because the process is to stop."""


class QloraTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on a model that already wears its adapter, and rows that are already tokenized.

    Differences: adapter weights keep the type they came with (TRL rounds them to bfloat16); a resume copies weights
    into them instead of making new ones of another type; evaluation is ours; RNG states of all ranks are in one place;
    micro-batches come from `loader`, and the loss is the mean over all tokens of a step that are learned, without the
    figures (entropy, accuracy) that TRL adds.
    """

    def __init__(
        self,
        *args: Any,
        model: Any,
        evaluator: Evaluator | None,
        meter: Throughput,
        loader: Loader,
        **kwargs: Any,
    ) -> None:
        weights = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(*args, model=model, **kwargs)
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.data = weights[name]
        self._evaluator = evaluator
        self._meter = meter
        self._loader = loader
        self._reducer: GradientReducer | None = None
        self._iterator: Iterator[Any] | None = None
        self._prefetched: list[Any] = []  # micro-batches of the next step
        self._first_bad_step: torch.Tensor | None = None
        self._gradient_norm: Any = None
        self._skipped_steps = 0
        #: Whether the weights are those of a whole number of steps: false while the optimizer works.
        self.at_step_boundary = True
        #: Called when an evaluation is given up because the process is to stop.
        self.on_interrupted: Callable[[], None] = lambda: None
        #: Whether this process is to stop; asked at each step.
        self.asked_to_stop: Callable[[], bool] = lambda: False
        self._stop_agreed: distributed.AsyncScalar | None = None
        #: Asked before each micro-batch.
        self.give_up: Callable[[], bool] = lambda: False

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.world_size > 1 and model is self.model:
            sharded = any(isinstance(each, DTensor) for each in model.parameters())
            trained = [each for each in model.parameters() if each.requires_grad]
            self._reducer = GradientReducer(trained, overlapped=not sharded)
            return self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # without DDP
        return super()._wrap_model(model, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' optimizer, with one launch for many matrices and no wait for the device."""
        optimizer = super().create_optimizer(*args, **kwargs)
        fuse_updates(optimizer)
        return optimizer

    def get_train_dataloader(self) -> Loader:
        """The engine's micro-batches of this process."""
        return self._loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step, and the tokens that all processes learn in it."""
        if epoch_iterator is not self._iterator:
            self._iterator, self._prefetched = epoch_iterator, []
        batches = [*self._prefetched, *islice(epoch_iterator, num_batches - len(self._prefetched))]
        self._prefetched = []
        self._meter.tokens += sum(_real_tokens(batch) for batch in batches)
        learned = torch.full((2,), sum(len(batch["target_ids"]) for batch in batches), device=device)
        if self.args.world_size > 1:
            learned[1] = int(self.asked_to_stop())
            torch.distributed.all_reduce(learned)
            self._stop_agreed = distributed.AsyncScalar(learned[1])
        return batches, learned[0]

    def agreed_to_stop(self) -> bool:
        """Whether any process had been asked to stop when this step began: all must leave at the same one.

        Known since then, so that nobody waits for the step itself to end.
        """
        if self.args.world_size == 1:
            return self.asked_to_stop()
        return self._stop_agreed is not None and bool(self._stop_agreed.value())

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: nothing shows it, and counting goes through all parameters."""
        return 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This micro-batch's part of the step's loss, a mean over the tokens of all processes."""
        return model(**inputs) / num_items_in_batch.clamp(min=1)  # type: ignore[no-any-return]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass; remembers, without waiting for the device, where the loss went bad.

        Raises GivenUp.
        """
        if self.give_up():
            raise StepAborted
        inputs = on_device(inputs, self.args.device)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        is_last = self.accelerator.sync_gradients
        with self._reducer.synchronized() if self._reducer and is_last else nullcontext():
            self.accelerator.backward(loss)
        loss = loss.detach()
        self._note(loss, self.state.global_step + 1)
        if is_last and self._iterator is not None:  # while the device works: at a log line it waits for the host
            self._prefetched = list(islice(self._iterator, 1))
        return loss * self.args.world_size  # the Trainer logs the mean over the processes

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._gradient_norm = super()._get_grad_norm(*args, **kwargs)
        return self._gradient_norm

    def note_gradient(self) -> None:
        """Remember whether the step just done had a gradient to go by: a loss can be finite where that is not.

        Now and then fp16 skips a step to find its loss scale; a run that only skips would never learn anything.
        """
        skipped = self.accelerator.optimizer_step_was_skipped
        self._skipped_steps = self._skipped_steps + 1 if skipped else 0
        if self._gradient_norm is None or (skipped and self._skipped_steps < self._skips_allowed):
            return
        self._note(torch.as_tensor(self._gradient_norm), self.state.global_step)

    @property
    def _skips_allowed(self) -> int:
        return min(_MOST_SKIPPED_STEPS, self.state.max_steps)

    def _note(self, value: torch.Tensor, step: int) -> None:
        """Remember `step` when `value` is the first that is NaN or infinite."""
        if self._first_bad_step is None:
            never = torch.iinfo(torch.int64).max
            self._first_bad_step = torch.full((), never, device=value.device)
        here = torch.where(torch.isfinite(value), self._first_bad_step, step)
        self._first_bad_step = torch.minimum(self._first_bad_step, here)

    def check_finite(self) -> None:
        """Raise Diverged when a number noted was NaN or infinite; called before anything is logged or kept."""
        if self._first_bad_step is None:
            return
        bad = self._first_bad_step
        if self.args.world_size > 1:
            bad = bad.clone()
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MIN)
        step = int(bad)
        if step <= self.state.global_step:
            raise Diverged(
                f"The loss, its gradient or the adapter's weights became NaN or infinite at step {step};"
                " the checkpoint before it is kept"
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Our evaluation in the place of the Trainer's; the callbacks hear of the result."""
        assert self._evaluator is not None
        self.check_finite()
        with self._meter.paused():
            try:
                metrics = self._evaluator(self.model)
            except EvaluationAborted:
                self.on_interrupted()
                return {}
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.check_finite()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trained = [weight.detach().norm() for weight in model.parameters() if weight.requires_grad]
        self._note(torch.stack(trained).sum(), self.state.global_step)
        self.check_finite()
        with self._meter.paused():
            Trainer._save_checkpoint(self, model, trial)  # TRL's would also write a model card

    def save_now(self) -> None:
        """Save and send a checkpoint of the last step boundary outside the training loop."""
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_adapter(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_weights(model or self.model, Path(resume_from_checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.world_size == 1:
            return
        # Every rank wrote to its own node's disk; the checkpoint is sent from rank 0's.
        name = f"rng_state_{self.args.process_index}.pth"
        files: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(files, (name, (Path(output_dir) / name).read_bytes()))
        if self.args.should_save:
            for each, content in files:
                (Path(output_dir) / each).write_bytes(content)


def _real_tokens(batch: dict[str, Any]) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else int(batch["input_ids"].numel())
