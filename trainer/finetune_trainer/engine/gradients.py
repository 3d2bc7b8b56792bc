"""Gradients summed over all processes while the backward pass goes on, as DistributedDataParallel does (Li et al. 2020,
arXiv:2006.15704). It copies each matrix to and fro; adapters have hundreds of small ones: here a bucket is one copy.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import distributed

#: Bytes of gradients that are worth a message of their own.
_BUCKET: Final = 32 << 20


class Summed:
    """The gradients of `parameters`, which begin as those of process 0 and are the same types on all processes."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._buckets: list[list[torch.nn.Parameter]] = []
        self._missing: list[int] = []  # gradients that each bucket waits for, only in the last pass of a step
        self._sent: list[tuple[torch.Tensor, Any]] = []
        for parameter in reversed(list(parameters)):  # about as the backward pass finds them
            distributed.broadcast(parameter.data, src=0)
            number = self._bucket_for(parameter)
            parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number))  # type: ignore[misc]

    @contextmanager
    def last_pass(self) -> Iterator[None]:
        """The backward pass within it is the last of a step: after it every gradient is the sum over all processes,
        and zero where none has found one."""
        self._missing = [len(bucket) for bucket in self._buckets]
        try:
            yield
            while len(self._sent) < len(self._buckets):
                self._send()
            for bucket, (vector, work) in zip(self._buckets, self._sent, strict=True):
                work.wait()
                for parameter, part in zip(bucket, vector.split([each.numel() for each in bucket]), strict=True):
                    parameter.grad = part.view_as(parameter)
        finally:
            self._missing, self._sent = [], []

    def _bucket_for(self, parameter: torch.nn.Parameter) -> int:
        last = self._buckets[-1] if self._buckets else []
        size = sum(each.numel() * each.element_size() for each in last)
        if last and size < _BUCKET and last[0].dtype == parameter.dtype:
            last.append(parameter)
        else:
            self._buckets.append([parameter])
        return len(self._buckets) - 1

    def _arrived(self, number: int) -> None:
        if not self._missing:
            return
        self._missing[number] -= 1
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        """The next bucket: in the same order everywhere, or processes would add what does not belong together."""
        bucket = self._buckets[len(self._sent)]
        gradients = (torch.zeros_like(each) if each.grad is None else each.grad for each in bucket)
        vector = torch.cat([each.flatten() for each in gradients])
        self._sent.append((vector, distributed.all_reduce(vector, async_op=True)))
