"""Our attention kernels, run by Triton's interpreter, compute what SDPA does."""

from typing import Any

import pytest
import torch

from support.trainer.triton import interpreted

#: Shorter than a tile, as long as one, empty, of a single token, and of many tiles.
LENGTHS = (37, 64, 0, 1, 200, 129)


def _inputs(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """As a model's projections leave them: heads of one token beside each other, keys and values in one tensor."""
    tokens = sum(LENGTHS)
    torch.manual_seed(0)
    query = torch.randn(tokens, heads * head_dim, dtype=dtype).view(tokens, heads, head_dim)
    both = torch.randn(tokens, 2 * kv_heads, head_dim, dtype=dtype)
    return query, both[:, :kv_heads], both[:, kv_heads:]


def _expected(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    parts, begin = [], 0
    for length in LENGTHS:
        q, k, v = (each[begin : begin + length].transpose(0, 1) for each in (query, key, value))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        )
        begin += length
    return torch.cat([part.transpose(0, 1) for part in parts])


def _with_gradients(function: Any, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    found = function(*leaves)
    torch.manual_seed(1)
    found.backward(torch.randn(found.shape).to(found.dtype))
    return [found.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("longest", [max(LENGTHS), 2048], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "tolerance"),
    [
        (4, 4, 64, torch.float32, 1e-5),
        (6, 2, 64, torch.float32, 1e-5),
        (4, 1, 128, torch.float32, 1e-5),
        (2, 2, 64, torch.float16, 2e-3),
    ],
)
def test_output_and_gradients_are_those_of_sdpa(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, tolerance: float, longest: int
) -> None:
    attention = interpreted("attention").attention
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    inputs = _inputs(heads, kv_heads, head_dim, dtype)
    found = _with_gradients(lambda *each: attention(*each, starts, longest, 0.1)[0], inputs)
    expected = _with_gradients(lambda *each: _expected(*each, 0.1), tuple(each.float() for each in inputs))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert float((ours.float() - theirs).abs().max() / theirs.abs().max()) < tolerance


def test_longest_may_be_more_than_any_sequence_has() -> None:
    attention = interpreted("attention").attention
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    inputs = _inputs(2, 1, 64, torch.float32)
    exact, more = (
        _with_gradients(lambda *each, n=longest: attention(*each, starts, n, 0.1)[0], inputs) for longest in (200, 512)
    )
    assert all(torch.equal(a, b) for a, b in zip(exact, more, strict=True))


def test_a_compiled_graph_holds_it_as_one_operation() -> None:
    module = interpreted("attention")
    query, key, value = _inputs(4, 2, 64, torch.float32)
    torch.library.opcheck(
        module.attention,
        (query.requires_grad_(), key, value, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32), 200, 0.1),
    )
