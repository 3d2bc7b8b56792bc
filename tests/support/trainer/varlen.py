"""Variable-length attention without a GPU: torch's kernel simulated, as two versions of torch call it."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.model.base import BaseModel
from finetune_trainer.planning.model_shape import ModelShape
from finetune_trainer.runtime.device import RuntimeDevice

#: Kernels are simulated here, whatever the capability that torch is made to tell.
CPU = RuntimeDevice("cpu")


def _simulated(query: Any, key: Any, value: Any, starts: Any, scale: float, window: tuple[int, int]) -> torch.Tensor:
    """What the kernel computes, sequence by sequence."""
    parts = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (each[begin:end].transpose(0, 1) for each in (query, key, value))
        ages = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (ages >= 0) & ((ages <= window[0]) if window[0] >= 0 else True)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        parts.append(found.transpose(0, 1))
    return torch.cat(parts)


def as_in_2_13(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, scale: Any = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    return _checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def as_in_2_11(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, scale: Any = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    return _checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


@functools.wraps(as_in_2_13)
def wrong_kernel(*args: Any, **options: Any) -> torch.Tensor:
    return 1.1 * as_in_2_13(*args, **options)


def _checked(query: Any, key: Any, value: Any, q: Any, k: Any, max_q: int, max_k: int, scale: Any, window: Any) -> Any:
    assert q.dtype == torch.int32 and torch.equal(q, k) and int(q[-1]) == len(query) == len(key)
    assert max_q == max_k >= int(q.diff().max())
    assert window[1] == 0
    return _simulated(query, key, value, q, scale, window)


def base_of(tiny_model: Path, open_attention: bool = True, **changes: Any) -> BaseModel:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_model)
    for name, value in changes.items():
        setattr(config, name, value)
    return BaseModel(
        name="org/base",
        commit=None,
        config=config,
        tokenizer=None,
        shape=ModelShape.from_config(config.to_dict()),
        linear_layers=(),
        open_attention=open_attention,
    )


def simulate_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
