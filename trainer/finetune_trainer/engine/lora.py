"""Share dropout and the A projection across LoRA adapters with the same input.

LoRA (arXiv:2106.09685) is base(x) + B A dropout(x) * scaling. PEFT computes it for q, k and v in turn, each with its
own mask: three copies of x are written, read and kept for the backward pass. All that differs here is which inputs are
dropped together; without dropout the numbers are the same.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from finetune_trainer.planning.memory import SAME_INPUT
from finetune_trainer.runtime.patches import restore_forward, swap_forward

_ADAPTER: Final = "default"
_31_BITS: Final = 2**31 - 1
#: What kernels.lora can add: products of float32 would be rounded, and a tile of a larger rank does not fit.
_HALF: Final = (torch.bfloat16, torch.float16)
_LARGEST_RANK: Final = 256
#: So that ranks, whose generators all start alike, drop different tokens. Odd, about 2^32 times the golden ratio.
_SEED_STEP_OF_RANK: Final = 0x9E3779B9 - 2**32


def share_lora_inputs(model: Any) -> None:
    """Let adapters with the same input share their work while `model` trains.

    Evaluation and generation run them as PEFT does, and so do adapters that are more than A and B (DoRA).
    """
    for parent in list(model.modules()):
        for members in _groups(parent):
            shared = SharedLoraInput(members)
            for index, member in enumerate(members):
                restore_forward(member)
                swap_forward(member, while_training(_lora_forward(member, shared, index), member.forward))
                member.shared_lora_input = shared


def while_training(trained: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `trained` while gradients are taken, else `plain`."""

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (trained if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def shared_lora_inputs(module: Any) -> list["SharedLoraInput"]:
    """Return the shared inputs of all adapters in `module`."""
    found = (getattr(each, "shared_lora_input", None) for each in module.modules())
    return list(dict.fromkeys(each for each in found if each is not None))


@contextmanager
def seeded_dropout(inputs: list["SharedLoraInput"], device: torch.device) -> Iterator[None]:
    """Draw a seed from torch's generator for the dropout mask of each of `inputs`, which is then a function of it.

    For compiled layers: such a mask is computed along with its product, and recomputed in the backward pass instead of
    kept. torch's own dropout draws a second time when it is recomputed: another mask, and a wrong gradient (torch 2.11
    and 2.13, activation_memory_budget below 1).
    """
    try:
        drawing = [each for each in inputs if each.drops]
        if drawing:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            seeds = torch.randint(-(2**31), 2**31, (len(drawing),), dtype=torch.int32, device=device)
            seeds = seeds + rank * _SEED_STEP_OF_RANK if rank else seeds
            for place, each in enumerate(drawing):
                each.seeds, each.place = seeds, place
        yield
    finally:
        clear_cache(inputs)


def clear_cache(inputs: list["SharedLoraInput"]) -> None:
    """Drop cached tensors after an aborted pass."""
    for each in inputs:
        each.clear()


def _groups(parent: Any) -> Iterator[list[Any]]:
    """Yield the adapters right below `parent`, in groups with the same input."""
    left = {name: child for name, child in parent.named_children() if _is_plain(child)}
    while left:
        first = next(iter(left))
        names = next((names for names in SAME_INPUT if first in names), (first,))
        yield [left.pop(name) for name in names if name in left]


def _is_plain(module: Any) -> bool:
    return (
        isinstance(module, LoraLayer)
        and not isinstance(module, ParamWrapper)  # experts: the layer is their own, with arguments of its own
        and _ADAPTER not in module.lora_variant
        and isinstance(dict(module.lora_A).get(_ADAPTER), torch.nn.Linear)
    )


def _lora_forward(member: Any, shared: "SharedLoraInput", index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        found, b, scaling = member.base_layer(x), member.lora_B[_ADAPTER], member.scaling[_ADAPTER]
        if shared.added_by_kernel and b.bias is None and found.dtype in _HALF and b.in_features <= _LARGEST_RANK:
            z, weight = shared(x, index).to(found.dtype), (b.weight * scaling).to(found.dtype)
            added: torch.Tensor = torch.ops.finetune.add_product(found, z, weight)
            return added
        summed: torch.Tensor = found + b(shared(x, index) * scaling)
        return summed.to(found.dtype)

    return forward


class SharedLoraInput:
    """A dropout(x) for each adapter with the input x, computed when the first of them asks."""

    #: Whether triton_lora adds what the members find to their base.
    added_by_kernel = False
    #: The function of kernels.lora that says whether it can.
    kernel_check = "self_check"

    def __init__(self, members: list[Any]) -> None:
        self._members = members
        self._dropout = members[0].lora_dropout[_ADAPTER]
        self.seeds: torch.Tensor | None = None  # one for each input of a layer; this one's is at `place`
        self.place = 0
        self._x: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if x is not self._x or index not in self._waiting:
            self._x, self._waiting = x, dict(enumerate(self._products(x)))
        found = self._waiting.pop(index)
        if not self._waiting:
            self._x = None
        return found

    @property
    def drops(self) -> bool:
        return isinstance(self._dropout, torch.nn.Dropout) and self._dropout.training

    def clear(self) -> None:
        self.seeds, self._x, self._waiting = None, None, {}

    def _products(self, x: torch.Tensor) -> list[torch.Tensor]:
        matrices = [member.lora_A[_ADAPTER].weight for member in self._members]
        dropped = self._dropout(x) if self.seeds is None else _dropped(x, self._dropout.p, self.seeds[self.place])
        if not torch.is_autocast_enabled(x.device.type):
            dropped = dropped.to(matrices[0].dtype)
        found = torch.nn.functional.linear(dropped, torch.cat(matrices))
        return list(found.split([len(each) for each in matrices], -1))


def _dropped(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Apply dropout with a mask that is a function of `seed` (int32 scalar), element by element: it takes no memory."""
    rows = math.prod(x.shape[:-1])
    row = torch.arange(rows, dtype=torch.int32, device=x.device).view(*x.shape[:-1], 1)
    column = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    bits = _mixed(_mixed(_mixed(row) ^ seed) ^ column) & _31_BITS
    return x * (bits >= min(round(p * 2**31), _31_BITS)) * (1 / (1 - p))


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Return a permutation of int32 whose every output bit depends on every input bit.

    Source: lowbias32 of C. Wellons' Hash Prospector.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
