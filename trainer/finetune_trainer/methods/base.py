"""The interface of a training method."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from finetune_api.status import ExecutionPlan

#: Makes the tensors of one micro-batch from its rows.
Collator = Callable[[Sequence[tuple[list[int], list[int]]]], dict[str, Any]]


class Method(Protocol):
    """What the training loop and the evaluator need to know of a method. Implementations hold no state."""

    name: str
    #: Metrics that improve when they fall; all others improve when they rise.
    minimized: frozenset[str]

    def collator(self, plan: ExecutionPlan, pad_id: int, rows: int, longest: int = 0) -> Collator:
        """Return the function that makes a micro-batch.

        Args:
            plan: Says whether rows are packed end to end, and whether passes are captured: then shapes must be few.
            pad_id: Token id that fills up padded rows.
            rows: The most rows of any micro-batch.
            longest: The most tokens of any row; 0 when shapes may change from batch to batch.
        """
        ...

    def loss(self, model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the loss of a micro-batch, summed over its targets, as a float32 scalar with a gradient."""
        ...

    def targets(self, batch: Mapping[str, Any]) -> int:
        """Return how many targets the loss of a micro-batch sums over: a step's loss is the mean over all of them."""
        ...
