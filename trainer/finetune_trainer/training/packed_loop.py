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

    def launch_pass(self, model: Any, inputs: dict[str, Any], targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self._place.mean_loss(inputs, targets.clamp(min=1))
        return loss
