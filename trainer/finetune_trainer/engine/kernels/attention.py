"""Causal attention of packed sequences, in Triton (FlashAttention-2, arXiv:2307.08691).

Most rows are a few hundred tokens long. With such rows torch's kernel spends its time on tiles that reach beyond a row
and, in the backward pass, on sums in memory: of queries' gradients, which tiles of keys add to, and of keys' and
values', once for each head that shares them. Here a tile of queries, or of keys for all heads of its group, computes
its gradient whole, at the price of two more products.

Tensors are [tokens, heads, head_dim], `starts` int32 [sequences + 1]. This module needs triton; what is in it is called
by torch's dispatcher, as finetune::attention.
"""

# ruff: noqa: N803, N806 - tensors in memory and what is known at compile time have capitals in Triton

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, eq=False)
class Tiles:
    """How each kernel is launched: M queries by N keys are a tile."""

    forward: Mapping[str, int]
    of_queries: Mapping[str, int]
    of_keys: Mapping[str, int]


#: The fastest of some thirty on an H100 and an H200.
_SHORT: Final = Tiles(
    forward={"M": 64, "N": 32, "num_warps": 4, "num_stages": 3},
    of_queries={"M": 64, "N": 64, "num_warps": 4, "num_stages": 2},
    of_keys={"M": 32, "N": 64, "num_warps": 4, "num_stages": 1},
)
_LONG: Final = Tiles(
    forward={"M": 128, "N": 128, "num_warps": 8, "num_stages": 3},
    of_queries={"M": 128, "N": 64, "num_warps": 8, "num_stages": 3},
    of_keys={"M": 64, "N": 128, "num_warps": 8, "num_stages": 1},
)
#: Tokens of the longest sequence from which large tiles are the faster ones.
_LONG_FROM: Final = 1024


def tiles(longest: int) -> Tiles:
    """Return the tiles for sequences of up to `longest` tokens."""
    return _LONG if longest >= _LONG_FROM else _SHORT


@triton.jit
def _bounds(STARTS, sequence):
    """Where a sequence begins among all tokens, and how many it has."""
    start = tl.load(STARTS + sequence).to(tl.int64)
    return start, (tl.load(STARTS + sequence + 1) - start).to(tl.int32)


@triton.jit
def _load(BASE, rows, stride, length, D: tl.constexpr, CUT: tl.constexpr):
    """Rows of one head; where they may be CUT, zero from `length` on."""
    at = BASE + rows[:, None] * stride + tl.arange(0, D)
    return tl.load(at, mask=rows[:, None] < length, other=0.0) if CUT else tl.load(at)


@triton.jit
def _store(BASE, rows, stride, length, values, D: tl.constexpr):
    at = BASE + rows[:, None] * stride + tl.arange(0, D)
    tl.store(at, values.to(BASE.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    Q, K, V, OUT, LSE, STARTS, scale, tokens,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute a tile of queries of one head: output and log2 of the softmax's denominator. Longest tiles come first."""
    head, sequence, tile = tl.program_id(0), tl.program_id(1), tl.num_programs(2) - 1 - tl.program_id(2)
    start, length = _bounds(STARTS, sequence)
    first = tile * M
    if first >= length:
        return
    rows = first + tl.arange(0, M)
    Q += start * q_t + head * q_h
    K += start * k_t + head // GROUP * k_h
    V += start * v_t + head // GROUP * v_h
    q = _load(Q, rows, q_t, length, D, True)
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, D], tl.float32)
    whole = first // N * N  # keys before it are seen by all of these queries
    for diagonal in tl.static_range(2):
        begin = whole if diagonal else 0
        end = tl.minimum(first + M, length) if diagonal else whole
        for at in range(begin, end, N):
            keys = at + tl.arange(0, N)
            scores = tl.dot(q, tl.trans(_load(K, keys, k_t, length, D, diagonal))) * (scale * _LOG2E)
            if diagonal:
                scores = tl.where(keys[None] <= rows[:, None], scores, float("-inf"))
            above = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - above[:, None])
            shrink = tl.exp2(highest - above)
            total = total * shrink + tl.sum(weights, 1)
            v = _load(V, keys, v_t, length, D, diagonal)
            out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None])
            highest = above
    _store(OUT + start * o_t + head * o_h, rows, o_t, length, out / total[:, None], D)
    tl.store(LSE + head * tokens + start + rows, highest + tl.log2(total), mask=rows < length)


@triton.jit(do_not_specialize=["tokens"])
def _backward_of_queries(
    Q, K, V, OUT, LSE, DELTA, DOUT, DQ, STARTS, scale, tokens,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, do_t, do_h, dq_t, dq_h,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute a tile of queries of one head: their gradient, and DELTA, the sum of OUT * DOUT, for the keys' part."""
    head, sequence, tile = tl.program_id(0), tl.program_id(1), tl.num_programs(2) - 1 - tl.program_id(2)
    start, length = _bounds(STARTS, sequence)
    first = tile * M
    if first >= length:
        return
    rows = first + tl.arange(0, M)
    Q += start * q_t + head * q_h
    K += start * k_t + head // GROUP * k_h
    V += start * v_t + head // GROUP * v_h
    q = _load(Q, rows, q_t, length, D, True)
    out = _load(OUT + start * o_t + head * o_h, rows, o_t, length, D, True)
    dout = _load(DOUT + start * do_t + head * do_h, rows, do_t, length, D, True)
    lse = tl.load(LSE + head * tokens + start + rows, mask=rows < length, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(DELTA + head * tokens + start + rows, delta, mask=rows < length)
    dq = tl.zeros([M, D], tl.float32)
    whole = first // N * N
    for diagonal in tl.static_range(2):
        begin = whole if diagonal else 0
        end = tl.minimum(first + M, length) if diagonal else whole
        for at in range(begin, end, N):
            keys = at + tl.arange(0, N)
            k = _load(K, keys, k_t, length, D, diagonal)
            v = _load(V, keys, v_t, length, D, diagonal)
            weights = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * _LOG2E) - lse[:, None])
            if diagonal:
                weights = tl.where(keys[None] <= rows[:, None], weights, 0.0)
            slope = weights * (tl.dot(dout, tl.trans(v)) - delta[:, None])
            dq = tl.dot(slope.to(k.dtype), k, dq)
    _store(DQ + start * dq_t + head * dq_h, rows, dq_t, length, dq * scale, D)


@triton.jit(do_not_specialize=["tokens"])
def _backward_of_keys(
    Q, K, V, LSE, DELTA, DOUT, DK, DV, STARTS, scale, tokens,
    q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h, dk_t, dk_h, dv_t, dv_h,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute a tile of keys and values of one head: their gradients from all GROUP heads of queries that read them."""
    head, sequence, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = _bounds(STARTS, sequence)
    first = tile * N
    if first >= length:
        return
    keys = first + tl.arange(0, N)
    k = _load(K + start * k_t + head * k_h, keys, k_t, length, D, True)
    v = _load(V + start * v_t + head * v_h, keys, v_t, length, D, True)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    Q += start * q_t + head * GROUP * q_h
    DOUT += start * do_t + head * GROUP * do_h
    LSE += start + head * GROUP * tokens
    DELTA += start + head * GROUP * tokens
    whole = tl.minimum((first + N + M - 1) // M * M, length)  # queries from it on see all of these keys
    for _ in range(GROUP):
        for diagonal in tl.static_range(2):
            begin = first // M * M if diagonal else whole
            end = whole if diagonal else length
            for at in range(begin, end, M):
                rows = at + tl.arange(0, M)
                q = _load(Q, rows, q_t, length, D, True)
                dout = _load(DOUT, rows, do_t, length, D, True)
                lse = tl.load(LSE + rows, mask=rows < length, other=0.0)
                delta = tl.load(DELTA + rows, mask=rows < length, other=0.0)
                weights = tl.exp2(tl.dot(k, tl.trans(q)) * (scale * _LOG2E) - lse[None])
                if diagonal:
                    weights = tl.where(keys[:, None] <= rows[None], weights, 0.0)
                dv = tl.dot(weights.to(dout.dtype), dout, dv)
                slope = weights * (tl.dot(v, tl.trans(dout)) - delta[None])
                dk = tl.dot(slope.to(q.dtype), q, dk)
        Q += q_h
        DOUT += do_h
        LSE += tokens
        DELTA += tokens
    _store(DK + start * dk_t + head * dk_h, keys, dk_t, length, dk * scale, D)
    _store(DV + start * dv_t + head * dv_h, keys, dv_t, length, dv, D)


@torch.library.custom_op("finetune::attention", mutates_args=())
def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each of the sequences that begin at `starts`, the longest of them of `longest` tokens.

    `query` [tokens, heads, head_dim]; `key` and `value` with as many heads, or a divisor of it. The output is like
    `query`; the second tensor, float32 [heads, tokens], is for the backward pass.
    """
    query, key, value = (_with_dense_rows(each) for each in (query, key, value))
    tokens, heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    tile = tiles(longest).forward
    _forward[heads, len(starts) - 1, triton.cdiv(longest, tile["M"])](
        query, key, value, out, lse, starts, scale, tokens,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *out.stride()[:2],
        GROUP=heads // key.shape[1], D=head_dim, **tile,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("finetune::attention_backward", mutates_args=())
def attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, from that of `attention`'s output and both of its results."""
    found, launches = backward_launches(gradient, query, key, value, out, lse, starts, longest, scale)
    for launch in launches:
        launch()
    return found


def backward_launches(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], tuple[Callable[[], None], ...]]:
    """Return the results of `attention_backward`, still empty, and the calls that fill them, one for each kernel."""
    gradient, query, key, value = (_with_dense_rows(each) for each in (gradient, query, key, value))
    tokens, heads, head_dim = query.shape
    dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (query, key, value))
    delta = torch.empty_like(lse)
    known = {"GROUP": heads // key.shape[1], "D": head_dim}
    inputs = [*query.stride()[:2], *key.stride()[:2], *value.stride()[:2]]
    sequences, chosen = len(starts) - 1, tiles(longest)
    of_queries = partial(
        _backward_of_queries[heads, sequences, triton.cdiv(longest, chosen.of_queries["M"])],
        query, key, value, out, lse, delta, gradient, dq, starts, scale, tokens,
        *inputs, *out.stride()[:2], *gradient.stride()[:2], *dq.stride()[:2], **known, **chosen.of_queries,
    )  # fmt: skip
    of_keys = partial(
        _backward_of_keys[key.shape[1], sequences, triton.cdiv(longest, chosen.of_keys["N"])],
        query, key, value, lse, delta, gradient, dk, dv, starts, scale, tokens,
        *inputs, *gradient.stride()[:2], *dk.stride()[:2], *dv.stride()[:2], **known, **chosen.of_keys,
    )  # fmt: skip
    return (dq, dk, dv), (of_queries, of_keys)


def _with_dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@attention.register_fake
def _(query, key, value, starts, longest, scale):
    return query.new_empty(query.shape), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@attention_backward.register_fake
def _(gradient, query, key, value, out, lse, starts, longest, scale):
    return tuple(each.new_empty(each.shape) for each in (query, key, value))


def _keep(ctx, inputs, output):
    *tensors, starts, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, starts)


def _backward(ctx, gradient, _):
    found = attention_backward(gradient, *ctx.saved_tensors, ctx.longest, ctx.scale)
    return *found, None, None, None


attention.register_autograd(_backward, setup_context=_keep)
