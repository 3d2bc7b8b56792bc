"""Triton kernels of decoding: one token's attention over a cache, and a norm that reads its row once.

Import it only where Triton is. `attention` reads of each row the tokens it has, not the length of the cache; its online
softmax is that of FlashAttention (arXiv:2205.14135).
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
