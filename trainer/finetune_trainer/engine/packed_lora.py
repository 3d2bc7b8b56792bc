"""Adapters of several trials on one frozen base, in one pass: each token meets the adapter of its own trial alone.

Trials have places. The matrices of all places lie in one tensor, so that a product of all tokens with the adapters of a
layer is one grouped product (model.grouped_experts), whatever their ranks: smaller ones are filled up with zeros. A
place without a trial has no tokens. No product sums over tokens of two trials, so one that becomes infinite spoils none
beside it.
"""

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer

from finetune_trainer.engine.lora import _31_BITS, _ADAPTER, _LARGEST_RANK, _is_plain, _mixed, while_training
from finetune_trainer.errors import NotPackable
from finetune_trainer.model.grouped_experts import grouped
from finetune_trainer.planning.memory import SAME_INPUT
from finetune_trainer.runtime.patches import restore_forward, swap_forward

#: torch's grouped products take rows of whole 16 bytes.
_MULTIPLE: Final = 8


@dataclass(frozen=True)
class Tokens:
    """Whose the tokens of a pass are.

    Attributes:
        ends: Where the tokens of each place end, int32 [places]; they begin where those of the place before end.
        place: The place of each token, int64 [tokens].
        number: The number of each token in its own trial's micro-batch, int32 [tokens]: padding beside it counts not.
        seeds: Of each place's dropout masks in this pass, int32 [places].
    """

    ends: torch.Tensor
    place: torch.Tensor
    number: torch.Tensor
    seeds: torch.Tensor

    def to(self, device: torch.device) -> "Tokens":
        ends, place, number, seeds = (
            each.to(device, non_blocking=True) for each in (self.ends, self.place, self.number, self.seeds)
        )
        for each in (place, number):
            torch._dynamo.maybe_mark_dynamic(each, 0)
        return Tokens(ends, place, number, seeds)


class _Slots:
    """The matrices of one trial, and where they and their gradients lie in the tensors of all places."""

    def __init__(self) -> None:
        #: By whether they lie in one piece: torch copies those that do in one launch, however many they are.
        self._parts: dict[bool, _Slices] = {True: _Slices(), False: _Slices()}

    def add(self, parameter: torch.nn.Parameter, stack: torch.Tensor, index: tuple[Any, ...], scale: float) -> None:
        assert stack.grad is not None
        weights = stack.data[index]
        part = self._parts[weights.is_contiguous()]
        part.parameters.append(parameter)
        part.weights.append(weights)
        part.gradients.append(stack.grad[index])
        part.scales.append(scale)

    def load(self) -> None:
        """Copy the weights to their places, scaled."""
        for part in self._parts.values():
            if part.weights:
                torch._foreach_copy_(part.weights, [each.detach() for each in part.parameters])
                torch._foreach_mul_(part.weights, part.scales)

    def gradients(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Yield each parameter with a copy of the gradient of its weights in their place."""
        for part in self._parts.values():
            if not part.parameters:
                continue
            found = [torch.empty_like(each) for each in part.parameters]
            torch._foreach_copy_(found, part.gradients)
            torch._foreach_mul_(found, part.scales)
            yield from zip(part.parameters, found, strict=True)


@dataclass
class _Slices:
    parameters: list[torch.nn.Parameter] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


class PackedAdapters:
    """The adapters of all places on the linear layers of one base model.

    Attributes:
        rank: The largest of any trial, or a little more.
        places: Trials at the same time.
    """

    def __init__(self, core: Any, places: int, rank: int, dtype: torch.dtype) -> None:
        """Prepare for `places` adapters on `core`.

        Args:
            core: A model of transformers that no trial computes with by itself.
            places: Trials at the same time.
            rank: The largest rank of any trial.
            dtype: In which the adapters are multiplied.
        """
        self.rank = rank + -rank % _MULTIPLE
        self._core, self.places, self._dtype = core, places, dtype
        device = core.device
        self._dropout = [0.0] * places
        self._keep_from = torch.zeros(places, dtype=torch.int32, device=device)
        self._kept_scale = torch.ones(places, device=device)
        self._inputs: dict[tuple[str, ...], PackedInput] = {}
        #: One for each input, by its name: masks differ between layers, and depend on no trial beside.
        self._numbers = torch.zeros(0, dtype=torch.int32, device=device)
        self._slots = [_Slots() for _ in range(places)]

    @property
    def drops(self) -> bool:
        return any(self._dropout)

    def enter(self, place: int, adapted: Any, dropout: float) -> None:
        """Give `place` to the adapter of the PEFT model `adapted`.

        Raises:
            NotPackable: It is more than plain LoRA on linear layers.
        """
        self._keep_from[place] = min(round(dropout * 2**31), _31_BITS)
        self._kept_scale[place] = 1 / (1 - dropout) if dropout < 1 else 0.0
        found = {name: each for name, each in adapted.get_base_model().named_modules() if isinstance(each, LoraLayer)}
        for name, each in found.items():
            if not _is_plain(each) or not isinstance(each.get_base_layer(), torch.nn.Linear):
                raise NotPackable(
                    f"spec.lora: trials of one process have adapters on linear layers alone, and {name} is none"
                )
        self.leave(place)
        self._dropout[place] = dropout
        slots = self._slots[place]
        for parent, names in _groups(found):
            self._input(parent, names).enter(place, {name: found[f"{parent}.{name}"] for name in names}, slots)

    def leave(self, place: int) -> None:
        """Forget the adapter at `place`."""
        self._slots[place], self._dropout[place] = _Slots(), 0.0
        for stack in self.stacks:
            stack.data[place].zero_()

    @property
    def stacks(self) -> list[torch.Tensor]:
        """The matrices of all places."""
        return [stack for each in self._inputs.values() for stack in each.stacks]

    def load(self) -> None:
        """Take over the weights of all places."""
        for slots in self._slots:
            slots.load()

    def begin(self, tokens: Tokens) -> None:
        """Prepare for a pass over `tokens`."""
        seeds = _mixed(self._numbers[:, None] ^ tokens.seeds)
        for each, mine in zip(self._inputs.values(), seeds, strict=True):
            each.begin(tokens, mine if self.drops else None, self._keep_from, self._kept_scale)

    def give_gradients(self, places: Sequence[int]) -> None:
        """Add what the backward pass found to the gradients of the parameters of `places`: of all, or of none.

        A pass that runs out of memory is run again: what it had added by then would count twice.
        """
        found = [each for place in places for each in self._slots[place].gradients()]
        for parameter, gradient in found:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self.clear()

    def clear(self) -> None:
        """Set gradients to zero, and drop tensors of an aborted pass."""
        gradients = [stack.grad for stack in self.stacks if stack.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)
        for each in self._inputs.values():
            each.clear()

    def _input(self, parent: str, names: tuple[str, ...]) -> "PackedInput":
        """Return the shared input of layers `names` of `parent`; one made for fewer of them makes room for all."""
        group = next((group for group in SAME_INPUT if names[0] in group), names)
        found = self._inputs.get((parent, *group))
        if found is None:
            module = self._core.get_submodule(parent)
            members = {name: getattr(module, name) for name in group if hasattr(module, name)}
            numbers = [zlib.crc32("/".join(names).encode()) & _31_BITS for names in (*self._inputs, (parent, *group))]
            drawn_from = torch.tensor(numbers, dtype=torch.int32, device=self._core.device)
            found = PackedInput(members, self.places, self.rank, self._dtype)
            # Nothing fails from here on: a trial that the memory is too small for must not leave half of it behind.
            self._inputs[parent, *group], self._numbers = found, drawn_from
        return found


def _groups(found: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the names of layers, in groups with the same input: their parent and their own."""
    left = dict.fromkeys(found)
    while left:
        parent, _, name = next(iter(left)).rpartition(".")
        group = next((group for group in SAME_INPUT if name in group), (name,))
        names = tuple(each for each in group if f"{parent}.{each}" in left)
        for each in names:
            del left[f"{parent}.{each}"]
        yield parent, names


class PackedInput:
    """A dropout(x) of all places for each layer with the input x, computed when the first of them asks.

    It stands where engine.lora's SharedLoraInput stands in a single trial: engine.compilation treats both alike.
    """

    #: As of SharedLoraInput: masks are drawn from seeds that come with the tokens.
    drops = False
    added_by_kernel = False
    kernel_check = "grouped_self_check"

    def __init__(self, members: Mapping[str, Any], places: int, rank: int, dtype: torch.dtype) -> None:
        first = next(iter(members.values()))
        self._names, self._rank, self._dtype = tuple(members), rank, dtype
        new = functools.partial(torch.zeros, dtype=dtype, device=first.weight.device)
        self._a = new(places, len(members) * rank, first.in_features).requires_grad_()
        self._b = [new(places, each.out_features, rank).requires_grad_() for each in members.values()]
        for stack in self.stacks:
            stack.grad = torch.zeros_like(stack)
        self._tokens: Tokens | None = None
        self._masks: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._x: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}
        for index, member in enumerate(members.values()):
            plain = member.forward
            restore_forward(member)
            swap_forward(member, while_training(_packed_forward(plain, self, index), plain))
            member.shared_lora_input = self

    @property
    def stacks(self) -> list[torch.Tensor]:
        return [self._a, *self._b]

    def enter(self, place: int, layers: Mapping[str, Any], slots: _Slots) -> None:
        """Make room at `place` for the matrices of `layers`, by name."""
        for name, layer in layers.items():
            index = self._names.index(name)
            a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            rows = slice(index * self._rank, index * self._rank + len(a))
            slots.add(a, self._a, (place, rows), 1.0)
            slots.add(b, self._b[index], (place, slice(None), slice(len(a))), layer.scaling[_ADAPTER])

    def begin(
        self, tokens: Tokens, seeds: torch.Tensor | None, keep_from: torch.Tensor, kept_scale: torch.Tensor
    ) -> None:
        """Prepare for a pass over `tokens`; `seeds` of the places' masks, None where nothing is dropped."""
        self._tokens = tokens
        self._masks = None if seeds is None else (seeds, keep_from, kept_scale)

    def clear(self) -> None:
        """Drop cached tensors. Whose the tokens are stays: a checkpointed layer is computed once more."""
        self._x, self._waiting = None, {}

    def add(self, found: torch.Tensor, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return `found`, the product of `x` with the base of the layer `index`, plus those with its adapters."""
        assert self._tokens is not None
        if x is not self._x or index not in self._waiting:
            self._x, self._waiting = x, dict(enumerate(self._products(x, self._tokens)))
        z, b = self._waiting.pop(index), self._b[index]
        if not self._waiting:
            self._x = None
        flat = found.flatten(0, -2)
        if self.added_by_kernel and found.dtype == self._dtype == torch.bfloat16 and self._rank <= _LARGEST_RANK:
            summed: torch.Tensor = torch.ops.finetune.add_grouped_product(
                flat, z, b, self._tokens.place, self._tokens.ends
            )
        else:
            summed = flat + grouped(z, b, self._tokens.ends, False).to(found.dtype)
        return summed.view(found.shape)

    def _products(self, x: torch.Tensor, tokens: Tokens) -> Sequence[torch.Tensor]:
        flat = x.flatten(0, -2)
        if self._masks is not None:
            flat = _dropped(flat, tokens, *self._masks)
        products: Sequence[torch.Tensor] = grouped(flat.to(self._dtype), self._a, tokens.ends, False).split(
            self._rank, -1
        )
        return products


def _packed_forward(plain: Callable[..., Any], shared: PackedInput, index: int) -> Callable[..., Any]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return shared.add(plain(x), x, index)

    return forward


def _dropped(
    x: torch.Tensor, tokens: Tokens, seeds: torch.Tensor, keep_from: torch.Tensor, kept_scale: torch.Tensor
) -> torch.Tensor:
    """Apply each trial's dropout to its tokens, with a mask that is a function of its seed and its own tokens alone."""
    column = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    mine = _mixed(_mixed(tokens.number) ^ seeds.index_select(0, tokens.place))[:, None]
    bits = _mixed(mine ^ column) & _31_BITS
    kept = bits >= keep_from.index_select(0, tokens.place)[:, None]
    return x * kept * kept_scale.index_select(0, tokens.place)[:, None].to(x.dtype)
