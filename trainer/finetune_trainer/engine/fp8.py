"""Products with frozen weights in 8-bit floating point: half the time of bf16 on GPUs that have it, less precise.

Both factors are rounded to e4m3 (3 bits of mantissa; Micikevicius et al. 2022, arXiv:2209.05433), with one scale for
each row of the activations and each row of the weights, in the forward pass and for the gradient of the input. The
adapter, norms, attention and the loss stay as they are.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch

from finetune_trainer.engine.modules import replace_modules
from finetune_trainer.errors import type_and_reason

E4M3: Final = torch.float8_e4m3fn
_LARGEST: Final = torch.finfo(E4M3).max
#: GPUs have it since Ada and Hopper; matrices must divide by this.
MIN_COMPUTE_CAPABILITY: Final = (8, 9)
_MULTIPLE: Final = 16
#: What the order of sums may change, as a part of the whole.
_TOLERANCE: Final = 1e-2


def rounded(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `matrix` [rows, columns] in e4m3, and the scale of each row, float32 [rows, 1]."""
    matrix = matrix.contiguous()
    largest = matrix.abs().amax(-1, keepdim=True).float()
    scale = torch.where(largest > 0, largest / _LARGEST, 1.0)
    return (matrix.float() / scale).clamp(-_LARGEST, _LARGEST).to(E4M3), scale


def product(
    left: torch.Tensor, left_scale: torch.Tensor, right: torch.Tensor, right_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return `left` [n, k] times the transpose of `right` [m, k], each row times its scale, as [n, m] in `dtype`."""
    if left.device.type != "cuda":  # the same numbers, slowly
        return ((left.float() * left_scale) @ (right.float() * right_scale).t()).to(dtype)
    return torch._scaled_mm(
        left, right.t(), scale_a=left_scale, scale_b=right_scale.t(), out_dtype=dtype, use_fast_accum=True
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        turned: torch.Tensor,
        turned_scale: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(turned, turned_scale)
        return product(*rounded(x), weight, scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = slopes
        turned, turned_scale = ctx.saved_tensors
        return product(*rounded(slope), turned, turned_scale, slope.dtype), None, None, None, None


class Fp8Linear(torch.nn.Module):
    """A frozen linear layer whose products are in e4m3.

    The weight is kept twice, as the hardware needs it for the forward and for the backward pass: together as many bytes
    as in bf16.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    turned: torch.Tensor
    turned_scale: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = linear.weight.dtype
        for name, matrix in (("weight", linear.weight.data), ("turned", linear.weight.data.t())):
            values, scale = rounded(matrix.contiguous())
            self.register_buffer(name, values, persistent=False)
            self.register_buffer(f"{name}_scale", scale, persistent=False)
        self.bias = linear.bias

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weight and its transpose, each with its scales."""
        return self.weight, self.weight_scale, self.turned, self.turned_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.to(self.compute_dtype).reshape(-1, self.in_features)
        found: torch.Tensor = _Product.apply(flat, *self.matrices)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            found = found + self.bias
        return found.to(x.dtype).view(*x.shape[:-1], self.out_features)


def self_check(device: str) -> str | None:
    """Compare a small product and its gradient with their definition; return what is wrong, None when both agree."""
    linear = torch.nn.Linear(64, 96, bias=False).bfloat16().requires_grad_(False)
    x, slope = torch.randn(48, 64).bfloat16(), torch.randn(48, 96).bfloat16()
    results = []
    try:
        for where in ("cpu", device):
            leaf = x.to(where).requires_grad_()
            y = Fp8Linear(linear).to(where)(leaf)
            (gradient,) = torch.autograd.grad(y, leaf, slope.to(where))
            results.append([each.detach().float().cpu() for each in (y, gradient)])
    except Exception as error:
        return f"fails here: {type_and_reason(error)}"
    worst = max(float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True))
    return None if worst <= _TOLERANCE else f"differs from its definition by {worst:.1%} on this GPU"


def convert(layers: Sequence[Any]) -> None:
    """Replace each plain frozen linear layer in `layers`, below adapters too, with an Fp8Linear."""
    replace_modules(layers, _fits, Fp8Linear)


def _fits(module: Any) -> bool:
    if not isinstance(module, torch.nn.Linear):
        return False
    plain = module.weight.dtype == torch.bfloat16 and not module.weight.requires_grad
    return plain and not module.in_features % _MULTIPLE and not module.out_features % _MULTIPLE
