"""Supervised fine-tuning: next-token cross-entropy on the tokens that a row's labels mark."""

from collections.abc import Mapping
from typing import Any

import torch

from finetune_api.status import ExecutionPlan
from finetune_trainer.data.batching import Collate, real_targets
from finetune_trainer.methods.base import Collator


class Sft:
    """Supervised fine-tuning on a model whose forward returns the summed loss (engine.model_loss)."""

    name = "sft"
    minimized = frozenset({"evalLoss"})

    def collator(self, plan: ExecutionPlan, pad_id: int, rows: int, longest: int = 0) -> Collator:
        return Collate(bool(plan.packing), pad_id, rows, longest, few_shapes=bool(plan.captured and longest))

    def loss(self, model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        summed: torch.Tensor = model(**batch)
        return summed

    def targets(self, batch: Mapping[str, Any]) -> int:
        return real_targets(batch)
