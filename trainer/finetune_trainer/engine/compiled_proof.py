"""Compare the gradients of compiled decoder layers with those of plain ones: what a compiler gets wrong is silent.

In torch 2.11 and 2.13 `triton.multi_kernel = 2` was such a case: kernels whose threads read what others had not written
yet, for reductions of up to 256 numbers. The loss was right, and the gradients of all layers but the last were noise.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import structlog
import torch
from torch.utils.checkpoint import checkpoint

from finetune_trainer.engine.lora import clear_cache, seeded_dropout, shared_lora_inputs, while_training
from finetune_trainer.runtime.patches import restore_forward, swap_forward
from finetune_trainer.runtime.rng import RngState

log = structlog.get_logger(__name__)
#: What the loss, and the gradient as a part of its norm, may differ by. In half precision 0.3 to 1 % were measured.
LOSS_TOLERANCE: Final = 1e-2
TOLERANCE: Final = 5e-2
#: In FP8 a number near the middle of two is rounded to either.
TOLERANCE_FP8: Final = 0.2


@dataclass(frozen=True)
class Found:
    """What a forward and a backward pass found.

    Attributes:
        loss: The loss.
        gradients: Those that are compared.
        drawn: The random generators after the forward pass.
    """

    loss: float
    gradients: Sequence[torch.Tensor]
    drawn: RngState


def problem_of(compiled: Found, model: Any, layers: Sequence[Any], run: Callable[[], Found], fp8: bool) -> str | None:
    """Return how far `compiled` is from what `run` finds with plain layers, None if it is not.

    The plain layers keep only their input for the backward pass, so that they fit where compiled ones do. Where they do
    not, and in models that drop by themselves, nothing can be compared, and the log says so.
    """
    try:
        with _plain(model, layers):
            plain = run()
    except torch.OutOfMemoryError:
        log.warning("The compiled layers were not compared with plain ones, for which the GPU has no memory")
        return None
    norm = _norm(plain.gradients)
    if not math.isfinite(plain.loss + norm) or not norm:
        return None  # training says what is wrong
    if not plain.drawn.same(compiled.drawn):
        log.info("The compiled layers were not compared with plain ones: the model drops by itself, other numbers each")
        return None
    loss = abs(compiled.loss - plain.loss) / max(abs(plain.loss), 1e-30)
    gradient = _norm(torch._foreach_sub(list(compiled.gradients), list(plain.gradients))) / norm
    log.debug("Compiled layers compared with plain ones", loss=loss, gradient=gradient)
    if loss <= LOSS_TOLERANCE and gradient <= (TOLERANCE_FP8 if fp8 else TOLERANCE):
        return None
    return f"compiled layers compute something else than plain ones: loss {loss:.1%}, gradient {gradient:.1%}"


@contextmanager
def _plain(model: Any, layers: Sequence[Any]) -> Iterator[None]:
    """Run `layers`, the adapters' sums and the loss without compiler and without our kernels in this block."""
    inputs, own_loss = shared_lora_inputs(model), model.get_base_model().fused_loss
    before = [layer.forward for layer in layers], [each.added_by_kernel for each in inputs], own_loss.compiled
    try:
        for layer in layers:
            restore_forward(layer)
            plain = layer.forward
            seeded = functools.partial(_seeded, plain, shared_lora_inputs(layer))
            swap_forward(layer, while_training(functools.partial(checkpoint, seeded, use_reentrant=False), plain))
        for each in inputs:
            each.added_by_kernel = False
        own_loss.compiled = False
        yield
    finally:
        clear_cache(inputs)
        for layer, forward in zip(layers, before[0], strict=True):
            swap_forward(layer, forward)
        for each, by_kernel in zip(inputs, before[1], strict=True):
            each.added_by_kernel = by_kernel
        own_loss.compiled = before[2]


def _seeded(plain: Callable[..., Any], inputs: list[Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    with seeded_dropout(inputs, hidden.device):
        return plain(hidden, *args, **kwargs)


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([each.float().norm() for each in tensors]).norm()) if tensors else 0.0
