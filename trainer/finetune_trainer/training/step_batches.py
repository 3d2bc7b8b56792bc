"""The micro-batches of one optimizer step, and what ranks must agree on before it begins."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from finetune_trainer.data.batching import Loader, real_tokens
from finetune_trainer.methods.base import Method
from finetune_trainer.runtime.signals import StopFlag
from finetune_trainer.runtime.transfer import AsyncScalar
from finetune_trainer.settings import Ranks
from finetune_trainer.training.throughput import Throughput


class StepBatches:
    """Fetches micro-batches, one ahead while the device works, and counts their tokens."""

    def __init__(self, loader: Loader, method: Method, ranks: Ranks, stop: StopFlag, throughput: Throughput) -> None:
        self.loader = loader
        self._method = method
        self._ranks = ranks
        self._stop = stop
        self._throughput = throughput
        self._iterator: Iterator[Any] | None = None
        self._prefetched: list[Any] = []
        self._stop_agreed: AsyncScalar | None = None

    def take(self, iterator: Iterator[Any], count: int, device: torch.device) -> tuple[list[Any], torch.Tensor]:
        """Return the next `count` micro-batches and the number of targets of all ranks in them. A collective.

        The same message tells whether any rank was asked to stop, so that nobody waits for it later.
        """
        if iterator is not self._iterator:
            self._iterator, self._prefetched = iterator, []
        batches = [*self._prefetched, *islice(iterator, count - len(self._prefetched))]
        self._prefetched = []
        self._throughput.tokens += sum(real_tokens(batch) for batch in batches)
        targets = torch.full((2,), sum(self._method.targets(batch) for batch in batches), device=device)
        if self._ranks.size > 1:
            targets[1] = int(bool(self._stop))
            torch.distributed.all_reduce(targets)
            self._stop_agreed = AsyncScalar(targets[1])
        return batches, targets[0]

    def prefetch(self) -> None:
        """Make the first micro-batch of the next step while the device works: at a log line it waits for the host."""
        if self._iterator is not None:
            self._prefetched = list(islice(self._iterator, 1))

    def agreed_to_stop(self) -> bool:
        """Return whether any rank had been asked to stop when this step began: all must leave at the same one."""
        if self._ranks.size == 1:
            return bool(self._stop)
        return self._stop_agreed is not None and bool(self._stop_agreed.value())
