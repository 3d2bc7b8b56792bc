"""What is told of a model by its modules: the kernels that it wants, and the weights that its code reads itself."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune_trainer.model.architecture import (
    is_plain_linear,
    linear_layers,
    missing_kernels,
    read_past,
)
from support.trainer.families import tiny_model

KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}


def _model(kind: str) -> Any:
    with torch.device("meta"):
        return tiny_model(kind)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make only these packages of kernels look installed."""
    plain = importlib.util.find_spec

    def having(*names: str) -> None:
        def find(name: str, *args: Any) -> Any:
            return (object() if name in names else None) if name in KERNELS else plain(name, *args)

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return having


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("llama", set()),
        ("qwen3_moe", set()),
        ("lfm2", {"causal_conv1d"}),
        ("qwen3_next", {"causal_conv1d", "fla"}),
        ("qwen3_5_text", {"causal_conv1d", "fla"}),
        ("kimi_linear", {"causal_conv1d", "fla"}),
        ("mamba", {"causal_conv1d", "mamba_ssm"}),
        ("mamba2", {"causal_conv1d", "mamba_ssm"}),
        ("nemotron_h", {"causal_conv1d", "mamba_ssm"}),
        ("falcon_h1", {"causal_conv1d", "mamba_ssm"}),
    ],
)
def test_kernels_that_a_family_wants_and_that_are_not_installed(
    kind: str, wanted: set[str], install: Callable[..., None]
) -> None:
    model = _model(kind)
    install()
    assert missing_kernels(model) == sorted(KERNELS[each] for each in wanted)
    install("causal_conv1d")
    assert missing_kernels(model) == sorted(KERNELS[each] for each in wanted - {"causal_conv1d"})
    install(*KERNELS)
    assert missing_kernels(model) == []


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", set()),
        ("bloom", set()),  # a part of a weight, where weights are in parts
        ("mamba", {"dt_proj", "out_proj", "x_proj"}),
        ("jamba", {"dt_proj"}),
        ("gemma3n_text", {"correction_coefs", "prediction_coefs"}),
    ],
)
def test_weights_that_the_code_around_them_reads_get_no_adapter(kind: str, names: set[str]) -> None:
    model = _model(kind)
    read = set(read_past(model))
    assert {name.rpartition(".")[2] for name in read} == names
    assert not read & set(linear_layers(model))


def test_linear_layers_by_another_name() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    before = torch.get_rng_state()
    assert is_plain_linear(FalconLinear)
    assert not is_plain_linear(Doubled)
    assert not is_plain_linear(torch.nn.Bilinear)
    assert torch.equal(torch.get_rng_state(), before)
