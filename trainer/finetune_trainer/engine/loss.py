"""Fused cross-entropy of a frozen head, tile by tile: the logits of all tokens never exist at one time.

The head does not train, so the gradient of its input is all there is to compute, and it is computed along with the
loss: no logits are kept, and none are computed again (Liger Kernel, arXiv:2410.10989, section 3.2; Cut Cross-Entropy,
arXiv:2411.09009).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

#: The most tokens of one tile.
TILE: Final = 1024
#: Tokens by which compiled tiles are compared with plain ones, and what half precision may differ by.
_CHECKED: Final = 33
_TOLERANCE: Final = 1e-2


@dataclass(frozen=True)
class Logits:
    """What a model does to its head's product.

    Attributes:
        scale: The product is multiplied by it.
        cap: Then it is held within ± this value; 0 for no cap.
    """

    scale: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, config: Any) -> "Logits":
        """Read transformers' settings: Gemma caps, Cohere, Falcon-H1, MiniCPM and Granite scale.

        Names are no proof: engine.proof compares the logits with the model's own.
        """
        text = config.get_text_config(decoder=True)
        scales = (getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
        scale = next((float(scale) for scale in scales if scale is not None), None)
        divisor = getattr(text, "logits_scaling", None)
        if scale is None and divisor is not None:
            scale = float(divisor) if text.model_type == "hyperclovax" else 1 / divisor
        caps = (getattr(text, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
        cap = next((float(cap) for cap in caps if cap), 0.0)
        return cls(1.0 if scale is None else scale, cap)

    def of_product(self, product: torch.Tensor) -> torch.Tensor:
        """Return the logits of the head's `product`, in float32."""
        full = product.float()
        if self.scale != 1.0:
            full = full * self.scale
        return torch.tanh(full / self.cap) * self.cap if self.cap else full


@dataclass(frozen=True)
class Owners:
    """Whose loss each target counts to, where several share a pass.

    Attributes:
        of: The number of each target's owner, int64 [targets]; `count` for one that nobody owns.
        count: Owners.
    """

    of: torch.Tensor
    count: int

    def sums(self, losses: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
        """Return the sum [count] of each owner's `losses` [targets, 1]. One that is infinite spoils no other's."""
        numbers = torch.arange(self.count, device=losses.device)
        return torch.where(self.of[part, None] == numbers, losses, 0.0).sum(0)

    def of_each(self, values: torch.Tensor) -> torch.Tensor:
        """Return for each target the value [targets, 1] of its owner, of `values` [count]; 0 where it has none."""
        return torch.cat([values, values.new_zeros(1)]).index_select(0, self.of)[:, None]


_Tile = Callable[[torch.Tensor, torch.Tensor, Logits, bool], tuple[torch.Tensor, torch.Tensor | None]]


def _tile(
    product: torch.Tensor, targets: torch.Tensor, logits: Logits, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the losses of the head's `product` [tokens, vocabulary] in float32, and its gradient in its type."""
    full = logits.of_product(product)
    normalizer = full.logsumexp(-1, keepdim=True)
    index = targets[:, None]
    loss = normalizer - full.gather(-1, index)
    if not with_gradient:
        return loss, None
    hit = torch.arange(full.shape[-1], device=full.device)[None] == index
    gradient = (full - normalizer).exp() - hit.float()
    if logits.cap:
        gradient = gradient * (1 - (full / logits.cap).square())
    if logits.scale != 1.0:
        gradient = gradient * logits.scale
    return loss, gradient.to(product.dtype)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        owners: Owners | None,
        logits: Logits,
        tile: _Tile,
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        loss = hidden.new_zeros(() if owners is None else owners.count, dtype=torch.float32)
        tiles = -(-len(targets) // TILE)
        for number in range(tiles):  # of equal size, but for one token
            part = slice(number * len(targets) // tiles, (number + 1) * len(targets) // tiles)
            product = torch.nn.functional.linear(hidden[part], weight, bias)
            losses, slope = tile(product, targets[part], logits, wanted)
            loss += _summed(losses, weights, owners, part)
            if gradient is not None and slope is not None:
                torch.mm(slope, weight, out=gradient[part])
        if gradient is not None and weights is not None:
            gradient *= weights[:, None]
        ctx.save_for_backward(gradient)
        ctx.owners = owners
        return loss

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        slope = slopes[0] if ctx.owners is None else ctx.owners.of_each(slopes[0])
        # In float32: the slope holds fp16's loss scale, which fp16 itself may not.
        return (gradient.float() * slope).to(gradient.dtype), *[None] * 7


def _summed(
    losses: torch.Tensor, weights: torch.Tensor | None, owners: Owners | None = None, part: slice = slice(None)
) -> torch.Tensor:
    """Return the sum of `losses` [targets, 1], those of `part`, or the sum of each owner's."""
    if weights is not None:
        losses = losses * weights[part, None]
    return losses.sum() if owners is None else owners.sums(losses, part)


def summed_cross_entropy(
    hidden: torch.Tensor,
    head: torch.nn.Linear,
    positions: torch.Tensor,
    targets: torch.Tensor,
    logits: Logits = Logits(),
    compiled: bool = False,
    weights: torch.Tensor | None = None,
    owners: Owners | None = None,
) -> torch.Tensor:
    """Return the loss in nats, summed over all targets, as a float32 scalar; 0 without targets.

    With `owners` it is the sum of each one's targets. Computed in the type of the head's weight, normalized in float32.

    Args:
        hidden: The last hidden states, [rows, tokens, width].
        head: The layer that makes logits of them.
        positions: Where in rows x tokens there is a target, int64 [targets].
        targets: The token ids to predict there, int64 [targets].
        logits: What the model does to the head's product.
        compiled: Whether tiles are computed by torch.compile.
        weights: What the loss of each target is multiplied by, float32 [targets]: 0 where it only fills up a shape.
        owners: Whose loss each target counts to.
    """
    chosen = hidden.flatten(0, 1).index_select(0, positions).to(head.weight.dtype)
    if _trains(head):
        return _summed(_tile(head(chosen), targets, logits, False)[0], weights, owners)
    tile = _compiled_tile() if compiled and torch.is_grad_enabled() else _tile
    with torch.autocast(hidden.device.type, enabled=False):
        loss: torch.Tensor = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            chosen, head.weight, head.bias, targets, weights, owners, logits, tile
        )
        return loss


def _trains(head: Any) -> bool:
    return any(parameter.requires_grad for parameter in head.parameters())  # lora.bias: all


@functools.cache
def _compiled_tile() -> _Tile:
    compiled = torch.compile(_tile)

    def tile(product: torch.Tensor, targets: torch.Tensor, *more: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        for tensor in (product, targets):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(product, targets, *more)

    return tile


@torch.no_grad()  # as in the function that computes them
def compiled_problem(head: Any, logits: Logits) -> str | None:
    """Return how far compiled tiles of `head` are from plain ones on random numbers, None if they are not.

    Those of a head that trains are not compiled.
    """
    if _trains(head):
        return None
    weight = head.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    product = torch.randn(_CHECKED, len(weight), generator=generator, device=weight.device).to(weight.dtype)
    targets = torch.randint(len(weight), (_CHECKED,), generator=generator, device=weight.device)
    (loss, gradient), (plain_loss, plain_gradient) = (
        tile(product, targets, logits, True) for tile in (_compiled_tile(), _tile)
    )
    assert gradient is not None and plain_gradient is not None
    pairs = ((loss, plain_loss), (gradient.float(), plain_gradient.float()))
    off = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs]
    return None if all(each <= _TOLERANCE for each in off) else f"the compiled loss differs by {max(off):.1%}"


def plain_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None, owners: Owners | None = None
) -> torch.Tensor:
    """Return the loss in nats of `logits` [targets, vocabulary], summed over all targets or over each owner's."""
    return _summed(_tile(logits, targets, Logits(), False)[0], weights, owners)
