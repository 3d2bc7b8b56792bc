"""Each kernel computes what torch or transformers does, in Triton's interpreter."""

import importlib
from typing import Any

import pytest
import torch

from finetune_trainer.evaluation import fixed_cache
from support.trainer.triton import interpreted


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(8, 2, 64), (2, 2, 128), (16, 1, 64)])
def test_attention_over_a_cache_is_that_of_torch(heads: int, key_heads: int, size: int) -> None:
    kernels = interpreted("decode_kernels", "evaluation")
    torch.manual_seed(0)
    query = torch.randn(3, 1, heads, size).half().transpose(1, 2)
    key, value = torch.randn(2, 3, key_heads, 150, size).half()
    starts, cursor = torch.tensor([0, 7, 99]), torch.tensor([130])
    cache = fixed_cache.FixedCache(3, 150, starts)
    places = torch.arange(150)
    cache.mask[:, 0, 0] = torch.where((places >= starts[:, None]) & (places <= cursor), 0.0, -torch.inf)
    found = kernels.attention(query, key, value, starts, cursor, size**-0.5)
    expected, _ = fixed_cache.attention(cache, None, None, query, key, value, cache.mask)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "key_heads", "size", "angles"),
    [(3, 1, 32, 8, 16, 3), (1, 70, 9, 3, 64, 1), (2, 7, 4, 4, 80, 1), (2, 5, 4, 1, 128, 2)],
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "mixtral"])
def test_heads_are_rotated_bit_for_bit_as_by_transformers(
    family: str, dtype: torch.dtype, rows: int, tokens: int, heads: int, key_heads: int, size: int, angles: int
) -> None:
    """Views of projections as attention makes them, and as a norm leaves them."""
    kernels = interpreted("decode_kernels", "evaluation")
    own = importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb
    torch.manual_seed(0)
    projected = torch.randn(rows, tokens, (heads + key_heads) * size).to(dtype)
    query, key = projected.split([heads * size, key_heads * size], -1)
    query = query.view(rows, tokens, heads, size).transpose(1, 2)
    key = key.reshape(rows, tokens, key_heads, size).transpose(1, 2).contiguous()
    cos, sin = torch.randn(2, angles, tokens, size).to(dtype)
    assert kernels.can_rotate(query, key, cos, sin)
    for found, expected in zip(kernels.rotary(query, key, cos, sin), own(query, key, cos, sin), strict=True):
        assert found.dtype == expected.dtype and found.transpose(1, 2).is_contiguous()
        assert torch.equal(found, expected)


def test_angles_of_more_digits_make_numbers_of_more_digits() -> None:
    """As under autocast, where projections are in half precision and angles are not."""
    kernels = interpreted("decode_kernels", "evaluation")
    own: Any = importlib.import_module("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 4, 5, 16).half()
    cos, sin = torch.randn(2, 2, 5, 16)
    expected = own.apply_rotary_pos_emb(query, key, cos, sin)
    for found, each in zip(kernels.rotary(query, key, cos, sin), expected, strict=True):
        assert found.dtype == each.dtype == torch.float32
        torch.testing.assert_close(found, each, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "changed",
    [
        {"cos": (2, 5, 8), "sin": (2, 5, 8)},  # a part of each head
        {"key": (2, 2, 6, 16)},
        {"query": (2, 4, 5, 15), "key": (2, 2, 5, 15), "cos": (2, 5, 15), "sin": (2, 5, 15)},
        {"cos": (3, 5, 16), "sin": (3, 5, 16)},
        {"sin": (1, 5, 16)},
        {"query": (8, 5, 16)},
    ],
)
def test_other_shapes_are_not_rotated(changed: dict[str, tuple[int, ...]]) -> None:
    kernels = interpreted("decode_kernels", "evaluation")
    shapes = {"query": (2, 4, 5, 16), "key": (2, 2, 5, 16), "cos": (2, 5, 16), "sin": (2, 5, 16)}
    assert kernels.can_rotate(*(torch.zeros(shape) for shape in shapes.values()))
    assert not kernels.can_rotate(*(torch.zeros(shape) for shape in (shapes | changed).values()))
    assert not kernels.can_rotate(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes.values()))


@pytest.mark.parametrize("shape", [(3, 1, 96), (1, 70, 96), (2, 2048), (0, 96)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gated_products_are_rounded_where_torch_rounds(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    kernels = interpreted("decode_kernels", "evaluation")
    torch.manual_seed(0)
    gate, up = (4 * torch.randn(2, *shape)).to(dtype)
    found, expected = kernels.silu_product(gate, up), torch.nn.functional.silu(gate) * up
    assert found.dtype == expected.dtype and found.shape == expected.shape
    steps = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=steps, atol=1e-6)
    if dtype == torch.float16 and found.numel():
        assert (found == expected).double().mean() > 0.99, "exp is all that may differ"
