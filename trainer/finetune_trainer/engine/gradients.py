"""Sum gradients over all ranks during the backward pass, in buckets (Li et al. 2020, arXiv:2006.15704).

torch's DistributedDataParallel, which averages, copies each matrix into its bucket and back. An adapter has hundreds of
small ones: here filling a bucket is one copy, and gradients stay in it.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import distributed

from finetune_trainer.engine.flat import flattened

#: Bytes of gradients that are worth a message of their own.
_BUCKET: Final = 32 << 20


class GradientReducer:
    """Sums the gradients of trained parameters over all ranks."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, overlapped: bool = True) -> None:
        """Give all ranks the parameters of rank 0. A collective.

        Args:
            parameters: In the same order and of the same types on all ranks.
            overlapped: Send buckets during the backward pass. Not where that itself communicates (FSDP): ranks that use
                other parameters would send in another order, and wait for each other forever.
        """
        self._buckets = _buckets(reversed(list(parameters)))  # about as the backward pass finds them
        self._pending: list[int] = []  # gradients that each bucket waits for, while synchronized
        self._sent: list[Any] = []
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                distributed.broadcast(parameter.data, src=0)
                if overlapped:
                    parameter.register_post_accumulate_grad_hook(functools.partial(self._arrived, number))

    @contextmanager
    def synchronized(self) -> Iterator[None]:
        """Sum the gradients of the backward pass in this block, the last of a step, over all ranks.

        Afterwards a gradient that no rank has computed is zero.
        """
        self._pending = [len(bucket) for bucket in self._buckets]
        try:
            yield
            while len(self._sent) < len(self._buckets):
                self._send()
            for work in self._sent:
                work.wait()
        finally:
            self._pending, self._sent = [], []

    def _arrived(self, number: int, parameter: torch.Tensor) -> None:
        if not self._pending:
            return
        self._pending[number] -= 1
        while len(self._sent) < len(self._buckets) and not self._pending[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        """Send the next bucket: in the same order on all ranks, or they would add what does not belong together."""
        bucket = self._buckets[len(self._sent)]
        vector, views = flattened([torch.zeros_like(each) if each.grad is None else each.grad for each in bucket])
        for parameter, view in zip(bucket, views, strict=True):
            parameter.grad = view
        self._sent.append(distributed.all_reduce(vector, async_op=True))


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Return buckets of one type each, in the order in which they were begun."""
    buckets: list[list[torch.nn.Parameter]] = []
    last: dict[torch.dtype, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        bucket = last.get(parameter.dtype)
        if bucket is None or sum(each.numel() * each.element_size() for each in bucket) >= _BUCKET:
            bucket = last[parameter.dtype] = []
            buckets.append(bucket)
        bucket.append(parameter)
    return buckets
