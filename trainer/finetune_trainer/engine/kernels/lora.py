"""A LoRA adapter's output added to its base's in one pass over memory, in Triton: base + z B^T.

B has as many columns as the adapter's rank: as a product of its own this writes, and reads again, as much as the base
does, for next to no arithmetic. This module needs triton; torch's dispatcher calls it as finetune::add_product.
"""

# ruff: noqa: N803 - tensors in memory and what is known at compile time have capitals in Triton

import torch
import triton
import triton.language as tl

from finetune_trainer.errors import type_and_reason
from finetune_trainer.model.grouped_experts import grouped, grouped_outer

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


@triton.jit(do_not_specialize=["rows"])
def _add_grouped_product(
    BASE, Z, B, PLACE, OUT, rows, columns, rank, base_row, z_row, b_place, b_row,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * M
    row = first + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    r = tl.arange(0, R)
    mine = tl.load(PLACE + row, mask=row < rows, other=-1)
    z = tl.load(Z + row[:, None] * z_row + r, mask=(row[:, None] < rows) & (r < rank), other=0.0)
    inside = (row[:, None] < rows) & (column < columns)
    found = tl.load(BASE + row[:, None].to(tl.int64) * base_row + column, mask=inside, other=0.0).to(tl.float32)
    begin = tl.load(PLACE + first).to(tl.int32)
    end = tl.load(PLACE + tl.minimum(first + M, rows) - 1).to(tl.int32) + 1
    for place in range(begin, end):
        b = tl.load(
            B + place * b_place + column[:, None] * b_row + r, mask=(column[:, None] < columns) & (r < rank), other=0.0
        )
        # Chosen, not multiplied by 0: what is infinite at one place stays there.
        found += tl.where((mine == place)[:, None], tl.dot(z, tl.trans(b)), 0.0)
    tl.store(OUT + row[:, None].to(tl.int64) * columns + column, found.to(OUT.dtype.element_ty), mask=inside)


@torch.library.custom_op("finetune::add_grouped_product", mutates_args=())
def add_grouped_product(
    base: torch.Tensor, z: torch.Tensor, b: torch.Tensor, place: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Return base + z b[place]^T of each row, summed in float32. The gradient of a place without rows is anything.

    Args:
        base: [rows, columns].
        z: [rows, rank], of one type with `base` and `b`.
        b: [places, columns, rank].
        place: Of each row, int64 [rows], ascending.
        ends: Where the rows of each place end, int32 [places].
    """
    base, z, b = (each if each.stride(-1) == 1 else each.contiguous() for each in (base, z, b))
    rows, columns = base.shape
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    rank = b.shape[2]
    _add_grouped_product[triton.cdiv(columns, _TILE["N"]), triton.cdiv(rows, _TILE["M"])](
        base, z, b, place, out, rows, columns, rank, base.stride(0), z.stride(0), b.stride(0), b.stride(1),
        R=max(16, triton.next_power_of_2(rank)), **_TILE,
    )  # fmt: skip
    return out


@add_grouped_product.register_fake
def _(base, z, b, place, ends):
    return base.new_empty(base.shape)


def _keep_grouped(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], inputs[2], inputs[4])


def _backward_grouped(ctx, gradient):
    z, b, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    return gradient, grouped(gradient, b.transpose(-2, -1), ends), grouped_outer(gradient, z, ends, False), None, None


add_grouped_product.register_autograd(_backward_grouped, setup_context=_keep_grouped)


def grouped_self_check(device: torch.device) -> str | None:
    """Compare a small sum of two places, and its gradients, with torch's. Returns what is wrong, None if both agree."""
    shapes = ((100, 200), (100, 16), (3, 200, 16))
    generator = torch.Generator(device).manual_seed(0)
    place = torch.tensor([0] * 37 + [2] * 63, device=device)
    ends = torch.tensor([37, 37, 100], dtype=torch.int32, device=device)
    try:
        drawn = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
        inputs = [each.bfloat16().requires_grad_() for each in drawn]
        base, z, b = inputs
        plain = torch.cat([base[:37] + z[:37] @ b[0].T, base[37:] + z[37:] @ b[2].T])
        results = [
            [found.detach(), *slopes, slope_of_b[[0, 2]]]
            for found in (add_grouped_product(base, z, b, place, ends), plain)
            for *slopes, slope_of_b in [torch.autograd.grad(found.float().square().sum(), inputs)]
        ]
    except Exception as error:
        return f"fails here: {type_and_reason(error)}"
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
    return None if worst <= _TOLERANCE else f"differs from torch's by {worst:.1%} on this GPU"


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
