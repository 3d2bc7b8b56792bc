"""A process of two that share out the layers of small stacks, and compare them with whole ones, bit for bit.

python -m support.trainer.odd_stacks     RANK, MASTER_ADDR, MASTER_PORT in the environment; prints `NAME: same` for each
"""

import copy
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed

from finetune_trainer.engine import fsdp
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.settings import Ranks

WIDTH, LAYERS = 8, 9


class Layer(torch.nn.Module):
    """Two frozen products and one that trains."""

    def __init__(self, inner: int = 16) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(WIDTH, inner), torch.nn.Linear(inner, WIDTH)
        self.requires_grad_(False)
        self.adapter = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, value: Any = None) -> Any:
        found: torch.Tensor = x + self.down(torch.tanh(self.up(x))) + self.adapter(x)
        return found


class Skipped(Layer):
    """Hands on what it is given."""

    def forward(self, x: torch.Tensor, value: Any = None) -> torch.Tensor:
        return x


class InPlace(Layer):
    """Returns its input, changed."""

    def forward(self, x: torch.Tensor, value: Any = None) -> torch.Tensor:
        return x.mul_(2).add_(super().forward(x.clone()))


class Shared(Layer):
    """Multiplies with values that one layer in four makes, and the others hand on."""

    def __init__(self, makes: bool) -> None:
        super().__init__()
        self.makes, self.value = makes, torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: torch.Tensor, value: Any = None) -> Any:
        x = x + torch.tanh(self.up(x)) @ self.up.weight
        value = self.value(x) if self.makes else value
        return super().forward(x) + value, value


class Hidden(Layer):
    """Returns something that nobody can look into."""

    def forward(self, x: torch.Tensor, value: Any = None) -> Any:
        return SimpleNamespace(hidden=super().forward(x))


class Stack(torch.nn.Module):
    """A model as `fsdp.shard` takes it, PEFT's part included."""

    _no_split_modules = [each.__name__ for each in (Layer, Skipped, InPlace, Shared, Hidden)]

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers, self.head = torch.nn.ModuleList(layers), torch.nn.Linear(WIDTH, 16).requires_grad_(False)

    def get_base_model(self) -> "Stack":
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = None
        for layer in self.layers:
            found = layer(x, value)
            x, value = found if isinstance(found, tuple) else (getattr(found, "hidden", found), None)
        product: torch.Tensor = self.head(x)
        return product


def _tied() -> Stack:
    """A frozen weight of two layers, and one of a layer and the head."""
    stack = Stack([Layer() for _ in range(LAYERS)])
    layers: Any = stack.layers
    layers[4].down.weight = layers[1].down.weight
    stack.head.weight = layers[2].up.weight
    return stack


STACKS: dict[str, Callable[[], Stack]] = {
    "plain": lambda: Stack([Layer() for _ in range(LAYERS)]),
    "one layer": lambda: Stack([Layer()]),
    "of different sizes": lambda: Stack([Layer(4 + 8 * index) for index in range(LAYERS)]),
    "layers skipped": lambda: Stack([(Skipped if index in (2, 3, 6) else Layer)() for index in range(LAYERS)]),
    "changed in place": lambda: Stack([(InPlace if index else Layer)() for index in range(LAYERS)]),
    "values of another layer": lambda: Stack([Shared(index % 4 == 0) for index in range(LAYERS)]),
    "tied weights": _tied,
    "hidden": lambda: Stack([Hidden() for _ in range(LAYERS)]),
}


def _trained(stack: Stack) -> list[torch.Tensor]:
    """Loss and gradients of two micro-batches, with an evaluation between them."""
    losses = []
    for seed in (1, 2):
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        losses.append(stack(x).square().sum())
        losses[-1].backward()
        with torch.no_grad():
            losses.append(stack(x.detach()).sum())
    return [each.detach() for each in losses] + [p.grad for p in stack.parameters() if p.grad is not None]


def _verdict(make: Callable[[], Stack]) -> str:
    torch.manual_seed(0)
    whole = make()
    ours = copy.deepcopy(whole)
    fsdp.shard(ours, Ranks(int(os.environ["RANK"]), 0, 2), "cpu")
    try:
        found = _trained(ours)
    except ConfigInvalid as error:
        return str(error)
    expected = _trained(whole)
    same = len(found) == len(expected) and all(map(torch.equal, found, expected))
    return "same" if same else "differs"


if __name__ == "__main__":
    distributed.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
    for name, make in STACKS.items():
        print(f"{name}: {_verdict(make)}", flush=True)
    distributed.destroy_process_group()
