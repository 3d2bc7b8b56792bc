"""Compare compiled decoder layers with plain ones before they train: what a compiler gets wrong is silent.

In torch 2.11 and 2.13 `triton.multi_kernel = 2` was such a case: threads read what others had not written yet, where a
norm has up to 256 numbers. The loss was right, and the gradients of all layers but the last were noise.

Layers are compared one by one, on the input that they had in a pass. Through a whole model half precision tells
nothing: with 32 layers of random weights the gradients of two right ways to compute differ by 10 % of their norm, and
by 74 % in FP8.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import structlog
import torch
from torch.utils._pytree import tree_leaves

from finetune_trainer.engine.lora import clear_cache, seeded_dropout, shared_lora_inputs
from finetune_trainer.runtime.patches import restore_forward, swap_forward
from finetune_trainer.runtime.precision import mixed_precision, torch_dtype
from finetune_trainer.runtime.rng import RngState

log = structlog.get_logger(__name__)
#: What one layer may differ by, as a part of what it adds to its input: in half precision about 1 % was measured.
_TOLERANCE: Final = 5e-2
#: In FP8 a number near the middle of two is rounded to either.
_TOLERANCE_FP8: Final = 0.2
#: The same as a part of the input itself, which is rounded with the sum.
_ROUNDING: Final = 1e-2
#: The same as a part of all gradients of the layer's adapters: some have next to none.
_OF_ALL: Final = 1e-3
#: Times what the last bit of its input changes in a layer: where two experts are all but equal it chooses among them.
_NOISE: Final = 2.0

Relevant = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


@dataclass(frozen=True)
class Call:
    """What a layer was called with.

    Attributes:
        layer: The layer.
        args: Its arguments by place, the hidden states first.
        kwargs: Those by name.
    """

    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def recorded(layers: Sequence[Any]) -> Iterator[list[Call]]:
    """Yield a list of what the first layer of each kind is called with in this block, and the last one."""
    first_of_kinds = {_kind(layer): layer for layer in reversed(layers)}
    chosen = {id(layer): layer for layer in (*first_of_kinds.values(), layers[-1])}
    calls: list[Call] = []

    def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if all(each.layer is not layer for each in calls):
            calls.append(Call(layer, args, kwargs))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in chosen.values()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def problem_of(calls: Sequence[Call], precision: str, relevant: Relevant = list) -> str | None:
    """Return what the compiled layers of `calls` compute differently from plain ones, None if nothing.

    A layer that drops by itself, and not by seeds as adapters do, cannot be compared, and the log says so.

    Args:
        calls: What the layers were called with.
        precision: training.precision.
        relevant: Returns what means something of the adapters' gradients.
    """
    before, tolerance = RngState.now(), _TOLERANCE_FP8 if precision == "fp8" else _TOLERANCE

    def computed(call: Call, run: Callable[..., Any], noisy: bool = False) -> _Result:
        before.restore()
        return _found(call, run, precision, relevant, noisy)

    try:
        for call in calls:
            plain = _plain(call.layer)
            found, expected = computed(call, call.layer.forward), computed(call, plain)
            drawn = RngState.now()
            if not _difference(found, expected, expected, tolerance):
                continue
            before.restore()
            with seeded_dropout(shared_lora_inputs(call.layer), call.args[0].device):
                by_seeds = RngState.now()
            if not drawn.same(by_seeds):
                log.info("A compiled layer was not compared with the plain one: it drops by itself")
                continue
            if problem := _difference(found, expected, computed(call, plain, noisy=True), tolerance):
                return f"a compiled layer computes something else than the plain one: {problem}"
    finally:
        before.restore()
    return None


def _kind(layer: Any) -> tuple[Any, ...]:
    """Return a key of all that a compiler may treat as a constant of `layer`."""
    simple = (bool, int, float, str, type(None))
    return tuple(
        (name, type(module).__name__, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, simple) and key != "layer_idx"
    )


def _plain(layer: Any) -> Callable[..., Any]:
    """Return a function that computes `layer` without compiler and without our kernel for adapters."""

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs, swapped = shared_lora_inputs(layer), layer.__dict__.get("forward")
        by_kernel = [each.added_by_kernel for each in inputs]
        restore_forward(layer)
        try:
            for each in inputs:
                each.added_by_kernel = False
            with seeded_dropout(inputs, hidden.device):
                return layer.forward(hidden, *args, **kwargs)
        finally:
            for each, value in zip(inputs, by_kernel, strict=True):
                each.added_by_kernel = value
            if swapped is not None:
                swap_forward(layer, swapped)

    return run


@dataclass(frozen=True)
class _Result:
    """What a layer found: `sums` of an input and what it adds to it, with those inputs, and its adapters' gradients."""

    sums: Sequence[tuple[str, torch.Tensor, torch.Tensor | None]]
    of_adapters: Sequence[torch.Tensor]


def _found(call: Call, run: Callable[..., Any], precision: str, relevant: Relevant, noisy: bool) -> _Result:
    inputs = shared_lora_inputs(call.layer)
    stacks = [stack for each in inputs for stack in getattr(each, "stacks", ())]
    trained = [each for each in call.layer.parameters() if each.requires_grad] + stacks
    hidden = call.args[0].detach()
    if noisy:
        size = torch.finfo(torch_dtype(precision)).eps / 2
        hidden = (hidden * (1 + size * _drawn_like(hidden.float(), 1))).to(hidden.dtype)
    # Nothing asks for the gradient of the input of layers below all that train: they are compiled without it.
    hidden.requires_grad_(call.args[0].requires_grad or bool(trained))
    try:
        with torch.enable_grad(), mixed_precision(hidden.device, precision):
            output = run(hidden, *call.args[1:], **call.kwargs)
        outputs = [each for each in tree_leaves(output) if isinstance(each, torch.Tensor) and each.is_floating_point()]
        added_to = [hidden.detach() if each.shape == hidden.shape else None for each in outputs]
        sums = [("output", each.detach(), base) for each, base in zip(outputs, added_to, strict=True)]
        if not hidden.requires_grad:
            return _Result(sums, [])
        outputs = [each for each in outputs if each.requires_grad]
        slopes = [_drawn_like(each) for each in outputs]
        slope, *of_adapters = torch.autograd.grad(
            outputs, [hidden, *trained], slopes, allow_unused=True, materialize_grads=True
        )
    finally:
        clear_cache(inputs)
    sums.append(("gradient of its input", slope, slopes[0] if slopes[0].shape == slope.shape else None))
    return _Result(sums, relevant(of_adapters))


def _drawn_like(tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(tensor.device).manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=tensor.device)


def _difference(found: _Result, expected: _Result, noisy: _Result, tolerance: float) -> str | None:
    """Return what differs by how much, None if nothing does. What is no number in both is left to the training.

    Args:
        found: The compiled layer's.
        expected: The plain layer's.
        noisy: The plain layer's of an input with other last bits.
        tolerance: What may differ.
    """
    rows: list[tuple[str, float, float]] = []
    for (name, ours, _), (_, theirs, base), (_, near, _) in zip(found.sums, expected.sums, noisy.sums, strict=True):
        added, beside = (_norm(theirs), 0.0) if base is None else (_norm(theirs - base), _norm(base))
        allowed = tolerance * added + _ROUNDING * beside + _NOISE * _norm(near - theirs)
        rows.append((name, _norm(ours - theirs), allowed))
    everything = math.sqrt(sum(_norm(each) ** 2 for each in expected.of_adapters))
    for ours, theirs, near in zip(found.of_adapters, expected.of_adapters, noisy.of_adapters, strict=True):
        allowed = tolerance * _norm(theirs) + _OF_ALL * everything + _NOISE * _norm(near - theirs)
        rows.append(("gradient of its adapters", _norm(ours - theirs), allowed))
    compared = [(name, off, allowed) for name, off, allowed in rows if math.isfinite(allowed)]
    log.debug("A compiled layer beside the plain one", parts_of_what_is_allowed=[o / a for _, o, a in compared if a])
    wrong = [(name, off / allowed if allowed else math.inf) for name, off, allowed in compared if not off <= allowed]
    if not wrong:
        return None
    name, times = max(wrong, key=lambda each: each[1] if each[1] == each[1] else math.inf)
    return f"its {name} differs by {times:.3g} times what may be"


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)))
