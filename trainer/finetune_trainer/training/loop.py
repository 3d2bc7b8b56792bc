"""TRL's SFTTrainer as the training loop: our batches, loss, gradient sums and files in its order of events."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerControl
from trl import SFTTrainer

from finetune_trainer.engine.fsdp import is_sharded
from finetune_trainer.engine.gradients import GradientReducer
from finetune_trainer.engine.graphs import StepGraphs
from finetune_trainer.engine.optimizer import fuse_updates
from finetune_trainer.methods.base import Method
from finetune_trainer.model.adapter import load_adapter_weights, save_adapter
from finetune_trainer.runtime.patches import forget_lomo, swap_zero_grad
from finetune_trainer.runtime.transfer import on_device
from finetune_trainer.training.hooks import TrainingHooks
from finetune_trainer.training.step_batches import StepBatches


class QloraTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer for a PEFT model and tokenized rows.

    It overrides what no public hook can do; everything else is in TrainingHooks.
    """

    control: TrainerControl

    def __init__(
        self,
        *,
        model: Any,
        method: Method,
        batches: StepBatches,
        hooks: TrainingHooks,
        captured: bool = False,
        **options: Any,
    ) -> None:
        self._method, self._batches, self._hooks = method, batches, hooks
        self._reducer: GradientReducer | None = None
        #: Passes replayed as CUDA graphs, if they are.
        self.graphs: StepGraphs | None = None
        weights = {name: each.data for name, each in model.named_parameters() if each.requires_grad}
        super().__init__(model=model, callbacks=[hooks], **options)
        for name, parameter in model.named_parameters():  # TRL rounds adapter weights to bfloat16: put them back
            if name in weights:
                parameter.data = weights[name]
        self.remove_callback(PrinterCallback)
        #: Those that train, as a module: walking all modules for them, twice a step, takes the host long.
        self._trained = torch.nn.ParameterList(each for each in model.parameters() if each.requires_grad)
        swap_zero_grad(model, self._trained)
        forget_lomo()
        if captured:
            self.graphs = StepGraphs(
                list(self._trained),
                lambda inputs, targets: self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=targets),
            )

    def get_train_dataloader(self) -> Any:
        return self._batches.loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        return self._batches.take(epoch_iterator, num_batches, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return this micro-batch's share of the step's loss, a mean over the targets of all ranks."""
        loss: torch.Tensor = self._method.loss(model, inputs) / num_items_in_batch.clamp(min=1)
        return loss

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one forward and backward pass without waiting for the device. Raises StepAborted."""
        self._hooks.before_micro_batch()
        is_last = self.accelerator.sync_gradients
        loss = self.graphs.run(inputs, num_items_in_batch) if self.graphs else None
        if loss is None:
            loss = self.launch_pass(model, on_device(inputs, self.args.device), num_items_in_batch)
        loss = loss * int(self.args.world_size)  # logged as the mean over ranks
        self._hooks.after_micro_batch(loss, self.state.global_step + 1)
        if is_last:
            self._batches.prefetch()
        return loss

    def launch_pass(self, model: Any, inputs: dict[str, Any], targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of a micro-batch on the device, with its gradient added to the parameters'."""
        loss = self.compute_loss(model, inputs, num_items_in_batch=targets)
        is_last = self.accelerator.sync_gradients
        with self._reducer.synchronized() if self._reducer and is_last else nullcontext():
            self.accelerator.backward(loss)
        return loss.detach()

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Make transformers' optimizer, with one launch for many matrices and no wait for the device."""
        optimizer = super().create_optimizer(*args, **options)
        fuse_updates(optimizer)
        return optimizer

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing: nobody reads it, and counting walks all parameters."""
        return 0

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write none with a checkpoint: publishing.model_card writes the adapter's."""

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Run our Evaluator instead of Trainer.evaluate and notify callbacks."""
        metrics = self._hooks.evaluate(self.state, self.control)
        if metrics and self._hooks.is_compared(self.state, metrics):
            if self.state.global_step > self._hooks.run.step:
                self.save_now()  # the others may take hours to come there
            metrics = self._hooks.compare(self.state, self.control, metrics)
        if metrics:
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_now(self) -> None:
        """Save and upload a checkpoint of the last step boundary, outside the training loop."""
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    # Private overrides: no public hook exists for these.

    def _wrap_model(self, model: Any, *args: Any, **options: Any) -> Any:
        """Leave out DDP, which copies each gradient twice: GradientReducer sums them."""
        if self.args.world_size == 1 or model is not self.model:
            return super()._wrap_model(model, *args, **options)
        self._reducer = GradientReducer(list(self._trained), overlapped=not is_sharded(model))
        return self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(self._trained)

    def _get_grad_norm(self, model: Any, *args: Any, **options: Any) -> Any:
        """Tell the hooks the norm: callbacks hear of it only at log lines."""
        norm = super()._get_grad_norm(self._trained, *args, **options)
        self._hooks.gradient_norm = norm
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Check the weights first, whoever asked for the save."""
        self._hooks.before_save(self.state)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter without asking the hub about embeddings."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_adapter(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Copy adapter weights in place: transformers would make new ones of another type."""
        load_adapter_weights(model or self.model, Path(resume_from_checkpoint))
