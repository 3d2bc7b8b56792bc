"""A LoRA adapter's output added to its base's in one pass over memory, in Triton: base + z B^T.

B has as many columns as the adapter's rank: as a product of its own this writes, and reads again, as much as the base
does, for next to no arithmetic. This module needs triton; torch's dispatcher calls it as finetune::add_product.
"""

# ruff: noqa: N803 - tensors in memory and what is known at compile time have capitals in Triton

import torch
import triton
import triton.language as tl

from finetune_trainer.errors import type_and_reason

#: What half precision may differ by, as a part of the result's norm.
_TOLERANCE = 1e-2
#: Rows and columns of a tile.
_TILE = {"M": 64, "N": 128, "num_warps": 4}


@triton.jit(do_not_specialize=["rows"])
def _add_product(
    BASE, Z, B, OUT, rows, columns, rank, base_row, z_row, b_row,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    r = tl.arange(0, R)
    z = tl.load(Z + row[:, None] * z_row + r, mask=(row[:, None] < rows) & (r < rank), other=0.0)
    b = tl.load(B + column[:, None] * b_row + r, mask=(column[:, None] < columns) & (r < rank), other=0.0)
    inside = (row[:, None] < rows) & (column < columns)
    base = tl.load(BASE + row[:, None].to(tl.int64) * base_row + column, mask=inside)
    found = tl.dot(z, tl.trans(b), base.to(tl.float32))
    tl.store(OUT + row[:, None].to(tl.int64) * columns + column, found.to(OUT.dtype.element_ty), mask=inside)


@torch.library.custom_op("finetune::add_product", mutates_args=())
def add_product(base: torch.Tensor, z: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return base + z b^T, summed in float32: `base` [..., columns], `z` [..., rank], `b` [columns, rank], one type."""
    flat, z, b = (each if each.stride(-1) == 1 else each.contiguous() for each in (base, z, b))
    flat, z = (each.flatten(0, -2) for each in (flat, z))
    rows, columns = flat.shape
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    rank = b.shape[1]
    _add_product[triton.cdiv(columns, _TILE["N"]), triton.cdiv(rows, _TILE["M"])](
        flat, z, b, out, rows, columns, rank, flat.stride(0), z.stride(0), b.stride(0),
        R=max(16, triton.next_power_of_2(rank)), **_TILE,
    )  # fmt: skip
    return out


@add_product.register_fake
def _(base, z, b):
    return base.new_empty(base.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, gradient):
    z, b = ctx.saved_tensors
    return gradient, gradient @ b, gradient.flatten(0, -2).T @ z.flatten(0, -2)


add_product.register_autograd(_backward, setup_context=_keep)


def self_check(device: torch.device) -> str | None:
    """Compare a small sum and its gradients with torch's. Returns what is wrong, None when both agree."""
    shapes = ((1, 70, 200), (1, 70, 16), (200, 16))
    generator = torch.Generator(device).manual_seed(0)
    try:
        drawn = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
        inputs = [each.bfloat16().requires_grad_() for each in drawn]
        base, z, b = inputs
        results = [
            [found, *torch.autograd.grad(found.float().square().sum(), inputs)]
            for found in (add_product(base, z, b), base + z @ b.T)
        ]
    except Exception as error:
        return f"fails here: {type_and_reason(error)}"
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
    return None if worst <= _TOLERANCE else f"differs from torch's by {worst:.1%} on this GPU"
