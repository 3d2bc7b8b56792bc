"""The training loop of a trial that shares its passes with others."""

from typing import Any

import torch

from finetune_trainer.sharing import Place
from finetune_trainer.training.loop import QloraTrainer


class PackedTrainer(QloraTrainer):
    """QloraTrainer whose micro-batches go through the base model together with those of other trials."""

    def __init__(self, *, place: Place, **options: Any) -> None:
        self._place = place
        super().__init__(**options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return this micro-batch's share of the step's loss; its gradients are those of the adapter already."""
        loss: torch.Tensor = self._place.mean_loss(inputs, num_items_in_batch.clamp(min=1))
        return loss.detach().requires_grad_()  # a leaf: the loop's own backward pass ends there
