"""Fixtures of the engine's tests."""

import pytest

from finetune_trainer.engine import attention
from support.trainer.triton import interpreted
from support.trainer.varlen import as_in_2_11, as_in_2_13


@pytest.fixture(params=[as_in_2_11, as_in_2_13, None], ids=["torch 2.11", "torch 2.13", "ours"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of varlen attention: torch's, simulated, or ours, interpreted."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", request.param or as_in_2_13)
    if request.param is None:
        interpreted("attention")
        monkeypatch.setattr(attention, "_ours", True)
        monkeypatch.setattr(attention, "_OUR_HEAD_DIMS", (16,))  # the tiny model's
