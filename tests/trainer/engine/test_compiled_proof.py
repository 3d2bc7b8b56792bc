"""Compiled layers that compute something else than plain ones do not train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune_api.status import ExecutionPlan
from finetune_trainer.data.batching import Collate
from finetune_trainer.engine import compiled_proof, loss
from finetune_trainer.engine.compilation import compile_layers
from finetune_trainer.engine.lora import share_lora_inputs
from finetune_trainer.engine.model_loss import patch_fused_loss
from support.trainer.tiny_model import build_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), layers=3)


def _adapted(folder: Path, dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.config.use_cache = False
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False, task_type="CAUSAL_LM"))
    patch_fused_loss(model.get_base_model())
    share_lora_inputs(model)
    return model.train()


def _batch() -> dict[str, Any]:
    rows = [torch.randint(4, 300, (length,), generator=torch.Generator().manual_seed(7)).tolist() for length in (9, 14)]
    return Collate(True, 0, rows=2, longest=20)([(row, row) for row in rows])


class _Wrong(torch.autograd.Function):
    """The same numbers, and another gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor, None]:
        return slopes[0] * ctx.factor, None


def _compiler(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Let torch.compile return what it is given, with `factor` times its gradient."""

    def compile_(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def compiled(*args: Any, **kwargs: Any) -> torch.Tensor:
            found: torch.Tensor = _Wrong.apply(function(*args, **kwargs), factor)  # type: ignore[no-untyped-call]
            return found

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr("finetune_trainer.engine.loss._compiled_tile", lambda: loss._tile)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.2, False), (float("nan"), False)])
def test_layers_with_other_gradients_run_as_they_are(
    factor: float, agrees: bool, dropout: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks of adapters' dropout are the same in both: they come from seeds."""
    _compiler(monkeypatch, factor)
    model, told = _adapted(folder, dropout), []
    monkeypatch.setattr("finetune_trainer.engine.compilation.log.warning", lambda text, **_: told.append(text))
    before = torch.get_rng_state()
    plan = compile_layers(model, ExecutionPlan(compiled=True), _batch(), "fp32")
    assert plan.compiled is agrees
    assert torch.equal(torch.get_rng_state(), before)
    assert all(each.grad is None for each in model.parameters())
    assert bool(told) is not agrees
    if told:
        assert "torch.compile failed, running eager (slower): compiled layers compute something else" in told[0]
    model(**_batch()).backward()  # trains with what is right
    found = [each.grad for each in model.parameters() if each.grad is not None]
    assert all(bool(each.isfinite().all()) for each in found)


def test_a_model_that_drops_by_itself_is_not_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _compiler(monkeypatch, 1.0)
    model, told = _adapted(folder), []
    monkeypatch.setattr(compiled_proof.log, "info", lambda text, **_: told.append(text))
    layer = model.get_base_model().model.layers[0]
    calls = iter((0.3, 0.2, 0.2))

    def drop(*_: Any) -> None:
        torch.nn.functional.dropout(torch.ones(round(1000 * next(calls))), 0.5)

    layer.register_forward_pre_hook(drop)
    assert compile_layers(model, ExecutionPlan(compiled=True), _batch(), "fp32").compiled
    assert ["drops by itself" in each for each in told] == [True]


def test_plain_layers_that_do_not_fit_prove_nothing_and_end_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compiler(monkeypatch, 1.0)
    model, told = _adapted(folder), []
    monkeypatch.setattr(compiled_proof.log, "warning", lambda text, **_: told.append(text))

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiled_proof, "_seeded", full)
    assert compile_layers(model, ExecutionPlan(compiled=True), _batch(), "fp32").compiled
    assert told == ["The compiled layers were not compared with plain ones, for which the GPU has no memory"]
    assert not any(layer.forward is layer.__class__.forward for layer in model.get_base_model().model.layers)
