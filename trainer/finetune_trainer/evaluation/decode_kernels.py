"""Triton kernels of evaluation: one token's attention over a cache, and what else is many small kernels in torch.

Import it only where Triton is. `attention` reads of each row the tokens it has, not the length of the cache; its online
softmax is that of FlashAttention (arXiv:2205.14135). The others round where torch does.
"""

# ruff: noqa: N803 - what is known at compile time has capitals in Triton

from typing import Any, Final

import torch
import triton
import triton.language as tl

#: Query heads of one program: what tl.dot takes at least.
_GROUP: Final = 16
_KEYS: Final = 64
#: Rows times key heads below which the programs do not fill a GPU: torch splits the keys too.
LEAST_PROGRAMS: Final = 128
#: Heads that one program rotates, and elements that one program multiplies.
_ROTATED: Final = 8
_MULTIPLIED: Final = 2048
#: What is computed in float32 and rounded.
_ROUNDED: Final = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _attention(
    query, key, value, out, starts, cursor, scale,
    query_row, query_head, key_row, key_head, key_token, value_row, value_head, value_token, out_row, out_head,
    GROUP: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    first = tl.load(starts + row).to(tl.int32)
    end = tl.load(cursor).to(tl.int32) + 1
    heads = tl.arange(0, HEADS)
    columns = tl.arange(0, SIZE)
    mine = heads < GROUP
    at = (head * GROUP + heads)[:, None]
    q = tl.load(query + row * query_row + at * query_head + columns[None, :], mask=mine[:, None], other=0.0)
    best = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    found = tl.zeros((HEADS, SIZE), tl.float32)
    keys = key + row * key_row + head * key_head
    values = value + row * value_row + head * value_head
    for begin in range(first // KEYS * KEYS, end, KEYS):
        tokens = begin + tl.arange(0, KEYS)
        seen = (tokens >= first) & (tokens < end)
        k = tl.load(keys + tokens[:, None] * key_token + columns[None, :], mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - better[:, None])
        kept = tl.exp(best - better)
        total = total * kept + tl.sum(weights, 1)
        v = tl.load(values + tokens[:, None] * value_token + columns[None, :], mask=seen[:, None], other=0.0)
        found = found * kept[:, None] + tl.dot(weights.to(v.dtype), v)
        best = better
    found = found / total[:, None]
    tl.store(out + row * out_row + at * out_head + columns[None, :], found.to(out.dtype.element_ty), mask=mine[:, None])


@triton.jit
def _rms_norm(x, weight, out, epsilon, columns, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / columns + epsilon)
    normed = (values * scale).to(x.dtype.element_ty)
    tl.store(out + row * columns + at, normed * tl.load(weight + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def _rotate_heads(
    x, out, head_stride, first, heads, cos_low, cos_high, sin_low, sin_high,
    SIZE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    head = (first + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < SIZE // 2)
    low = tl.load(x + head * head_stride + column, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + head * head_stride + SIZE // 2 + column, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    begin = (low * cos_low).to(kind).to(tl.float32) - (high * sin_low).to(kind).to(tl.float32)
    end = (high * cos_high).to(kind).to(tl.float32) + (low * sin_high).to(kind).to(tl.float32)
    tl.store(out + head * SIZE + column, begin.to(kind), mask=inside)
    tl.store(out + head * SIZE + SIZE // 2 + column, end.to(kind), mask=inside)


@triton.jit
def _rotary(
    query, key, cos, sin, query_out, key_out, tokens, query_heads, key_heads,
    query_row, query_head, query_token, key_row, key_head, key_token, cos_row, cos_token, sin_row, sin_token,
    SIZE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row, token = place // tokens, place % tokens
    column = tl.arange(0, HALF)[None, :]
    inside = column < SIZE // 2
    cos += row * cos_row + token * cos_token + column
    sin += row * sin_row + token * sin_token + column
    cos_low = tl.load(cos, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(1) * HEADS
    of_query = tl.cdiv(query_heads, HEADS) * HEADS
    if first < of_query:
        _rotate_heads(
            query + row * query_row + token * query_token, query_out + place * query_heads * SIZE, query_head,
            first, query_heads, cos_low, cos_high, sin_low, sin_high, SIZE, HEADS, HALF,
        )  # fmt: skip
    else:
        _rotate_heads(
            key + row * key_row + token * key_token, key_out + place * key_heads * SIZE, key_head,
            first - of_query, key_heads, cos_low, cos_high, sin_low, sin_high, SIZE, HEADS, HALF,
        )  # fmt: skip


@triton.jit
def _silu_product(gate, up, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    activated = (x / (1.0 + tl.exp(-x))).to(gate.dtype.element_ty).to(tl.float32)
    product = activated * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, product.to(out.dtype.element_ty), mask=inside)


def takes(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Return whether `attention` computes heads of this size and type, and is worth it."""
    size, group = query.shape[-1], query.shape[1] // key.shape[1]
    half = query.dtype == key.dtype and key.dtype in (torch.bfloat16, torch.float16) and query.stride(3) == 1
    return half and size in (64, 128, 256) and group <= _GROUP and key.shape[0] * key.shape[1] >= LEAST_PROGRAMS


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    cursor: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return the attention of one token of each row.

    Args:
        query: [rows, heads, 1, head_dim].
        key: [rows, heads of keys, length, head_dim].
        value: Likewise.
        starts: The place of each row's first token [rows].
        cursor: The place of the newest token of all rows [1].
        scale: What products are multiplied by.

    Returns:
        [rows, 1, heads, head_dim].
    """
    rows, heads, _, size = query.shape
    out = query.new_empty(rows, 1, heads, size)
    _attention[(rows, key.shape[1])](
        query, key, value, out, starts, cursor, scale,
        query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3], out.stride(0), out.stride(2),
        GROUP=heads // key.shape[1], SIZE=size, KEYS=_KEYS, HEADS=_GROUP,
    )  # fmt: skip
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the root mean square norm of the last dimension of `x`, rounded before it is multiplied by `weight`."""
    x = x.contiguous()
    out: Any = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    columns = x.shape[-1]
    _rms_norm[(x.numel() // columns,)](
        x, weight, out, epsilon, columns, WIDTH=triton.next_power_of_2(columns), num_warps=8 if columns > 2048 else 4
    )
    return out  # type: ignore[no-any-return]


def can_rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Return whether `rotary` has code for these shapes and types, not whether it is what the model computes."""
    if query.dim() != 4 or key.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or cos.dtype != sin.dtype:
        return False
    rows, size = query.shape[0], query.shape[3]
    same = key.shape[0] == rows and key.shape[2:] == query.shape[2:] and key.dtype == query.dtype
    turned = cos.shape[0] in (1, rows) and cos.shape[1:] == query.shape[2:]
    adjacent = all(each.stride(-1) == 1 for each in (query, key, cos, sin))
    return same and turned and adjacent and size % 2 == 0 and {query.dtype, cos.dtype} <= set(_ROUNDED)


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys turned by their positions: x * cos + rotate_half(x) * sin.

    Args:
        query: [rows, heads, tokens, head_dim], of any strides but the last.
        key: Likewise, with fewer heads or as many.
        cos: [rows or 1, tokens, head_dim].
        sin: Likewise.

    Returns:
        Both, with the heads of a token side by side in memory.
    """
    rows, heads, tokens, size = query.shape
    kind = torch.promote_types(query.dtype, cos.dtype)
    new = [query.new_empty(rows, tokens, each.shape[1], size, dtype=kind) for each in (query, key)]
    cos_row, sin_row = (each.stride(0) if each.shape[0] > 1 else 0 for each in (cos, sin))
    groups = sum(triton.cdiv(each.shape[1], _ROTATED) for each in (query, key))
    if rows * tokens:
        _rotary[(rows * tokens, groups)](
            query, key, cos, sin, *new, tokens, heads, key.shape[1],
            *query.stride()[:3], *key.stride()[:3], cos_row, cos.stride(1), sin_row, sin.stride(1),
            SIZE=size, HEADS=_ROTATED, HALF=triton.next_power_of_2(size // 2), num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return new[0].transpose(1, 2), new[1].transpose(1, 2)


def silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, the first rounded before it is multiplied."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate, dtype=torch.promote_types(gate.dtype, up.dtype))
    if out.numel():
        grid = (triton.cdiv(out.numel(), _MULTIPLIED),)
        _silu_product[grid](gate, up, out, out.numel(), BLOCK=_MULTIPLIED)
    return out
