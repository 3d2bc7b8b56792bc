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
from support.trainer import random_models
from support.trainer.tiny_model import build_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), layers=3)


def _adapted(folder: Path, dropout: float = 0.0, **more: Any) -> Any:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.config.use_cache = False
    wanted = LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False, task_type="CAUSAL_LM", **more)
    model = get_peft_model(base, wanted)
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
    assert [("a compiled layer computes something else" in each, "eager" in each) for each in told] == (
        [] if agrees else [(True, True)]
    )
    model(**_batch()).backward()  # trains with what is right
    found = [each.grad for each in model.parameters() if each.grad is not None]
    assert found and all(bool(each.isfinite().all()) for each in found)


def test_one_layer_of_each_kind_is_compared_and_the_last_one(folder: Path) -> None:
    layers = _adapted(folder).get_base_model().model.layers
    for kinds, expected in (((0, 0, 0), [0, 2]), ((0, 5, 0), [0, 1, 2]), ((0, 0, 5), [0, 2]), ((5, 0, 0), [0, 1, 2])):
        for layer, window in zip(layers, kinds, strict=True):
            layer.self_attn.sliding_window = window
        with compiled_proof.recorded(layers) as calls:
            for layer in layers:
                with pytest.raises(IndexError):
                    layer(torch.ones(1))
        assert [list(layers).index(each.layer) for each in calls] == expected


@pytest.mark.parametrize(("dropping", "compiled"), [((0, 1, 2), True), ((0,), False)])
def test_a_layer_that_drops_by_itself_is_not_compared(
    dropping: tuple[int, ...], compiled: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler drops other numbers, and may leave the generator where the plain layer does."""
    _compiler(monkeypatch, 1.2)
    model, told = _adapted(folder), []
    monkeypatch.setattr(compiled_proof.log, "info", lambda text, **_: told.append(text))

    def drop(*_: Any) -> None:
        torch.nn.functional.dropout(torch.ones(100), 0.5)

    for index in dropping:
        model.get_base_model().model.layers[index].mlp.register_forward_pre_hook(drop)
    assert compile_layers(model, ExecutionPlan(compiled=True), _batch(), "fp32").compiled is compiled
    told = [line for line in told if "drops" in line]
    compared = 1 + (2 in dropping)  # one of each kind, and the last one
    assert told == ["A compiled layer was not compared with the plain one: it drops by itself"] * compared


@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.2, False)])
def test_experts_that_the_last_bit_chooses_may_be_others(
    factor: float, agrees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision makes two experts equal; the difference is as large as an expert, and no fault."""
    routed: dict[str, Any] = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "mlp_only_layers": [],
    }
    model = random_models.build("qwen3_moe", **routed).to(torch.bfloat16)
    for name, each in model.named_parameters():
        if each.dim() > 1 and "embed" not in name:
            each.data.div_(0.3 * each.shape[-1] ** 0.5 / 1.4)
    patch_fused_loss(model.get_base_model())
    share_lora_inputs(model)
    _compiler(monkeypatch, factor)
    inner = torch.compile

    def rounding_otherwise(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(hidden: torch.Tensor, **more: Any) -> torch.Tensor:
            generator = torch.Generator().manual_seed(5)
            noise = torch.randn(hidden.shape, generator=generator) * 2**-8
            return inner(function)(hidden + (hidden.float() * noise).to(hidden.dtype), **more)

        return run

    monkeypatch.setattr(torch, "compile", rounding_otherwise)
    rows = [torch.randint(4, 300, (200,)).tolist() for _ in range(2)]
    batch = Collate(False, 0, rows=2, longest=200)([(row, row) for row in rows])
    assert compile_layers(model, ExecutionPlan(compiled=True), batch, "bf16").compiled is agrees


def test_layers_below_all_that_train_are_compared_without_a_gradient(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are trained: with one they would be compiled once more, for the comparison alone."""
    asked: list[tuple[int, bool]] = []
    factors: dict[int, float] = {}

    def compile_(function: Any) -> Any:
        def compiled(hidden: torch.Tensor, **more: Any) -> Any:
            asked.append((layers.index(function.__self__), hidden.requires_grad))
            return function(hidden, **more) * factors.get(asked[-1][0], 1.0)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr("finetune_trainer.engine.loss._compiled_tile", lambda: loss._tile)
    for factor, agrees in ((1.0, True), (1.2, False)):
        factors[0] = factor
        model = _adapted(folder, layers_to_transform=[1, 2])
        layers = list(model.get_base_model().model.layers)
        assert compile_layers(model, ExecutionPlan(compiled=True), _batch(), "fp32").compiled is agrees
        assert {(place, grad) for place, grad in asked if place < 2} == {(0, False), (1, True)}


def test_an_adapter_that_only_one_of_both_reaches_is_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler may hand out zeros where autograd hands out nothing, as of an expert that no token chose."""
    model = _adapted(folder)
    unused = torch.nn.Parameter(torch.ones(3))
    layers = model.get_base_model().model.layers
    layers[0].register_parameter("unused", unused)

    def compile_(function: Any) -> Any:
        return lambda *args, **more: function(*args, **more) + 0 * unused.sum()

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr("finetune_trainer.engine.loss._compiled_tile", lambda: loss._tile)
    assert compile_layers(model, ExecutionPlan(compiled=True), _batch(), "fp32").compiled


def test_a_comparison_that_memory_is_short_for_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    _compiler(monkeypatch, 1.2)
    monkeypatch.setattr(compiled_proof, "_found", full)
    model, told = _adapted(folder), []
    monkeypatch.setattr("finetune_trainer.engine.compilation.log.warning", lambda text, **_: told.append(text))
    assert compile_layers(model, ExecutionPlan(compiled=True), _batch(), "fp32").compiled
    assert told == ["Compiled layers were not compared with plain ones: the GPU's memory is full"]


@pytest.mark.parametrize("own", [False, True])
def test_a_loss_that_is_not_compiled_is_not_compared(own: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model's own logits, whose head may be anywhere, or where the head trains."""
    _compiler(monkeypatch, 1.0)
    monkeypatch.setattr("finetune_trainer.engine.loss._compiled_tile", lambda: pytest.fail("compiled"))
    saved: dict[str, Any] = {} if own else {"modules_to_save": ["lm_head"]}
    model = _adapted(folder, **saved)
    core = model.get_base_model()
    if own:
        core.fused_loss.own = True
        monkeypatch.setattr(core, "get_output_embeddings", lambda: None)
    assert compile_layers(model, ExecutionPlan(compiled=True), _batch(), "fp32").compiled


def test_a_loss_that_is_compiled_to_something_else_is_computed_plainly(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compiler(monkeypatch, 1.0)

    def wrong(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        found, gradient = loss._tile(*inputs)
        return found, None if gradient is None else gradient * 1.1

    monkeypatch.setattr("finetune_trainer.engine.loss._compiled_tile", lambda: wrong)
    model, told = _adapted(folder), []
    monkeypatch.setattr("finetune_trainer.engine.compilation.log.warning", lambda text, **_: told.append(text))
    assert compile_layers(model, ExecutionPlan(compiled=True), _batch(), "fp32").compiled is False
    assert "the compiled loss differs by 10.0%" in told[0]
    assert model.get_base_model().fused_loss.compiled is False


@pytest.mark.parametrize(("off", "problem"), [(0.0, False), (0.04, False), (0.06, True), (float("nan"), True)])
@pytest.mark.parametrize("part", ["output", "gradient", "adapter"])
def test_what_a_layer_adds_is_what_counts_not_what_passes_through_it(part: str, off: float, problem: bool) -> None:
    base, added, adapter = torch.zeros(8), torch.ones(8), torch.ones(4)

    def result(output: float, gradient: float, of_adapter: float) -> compiled_proof._Result:
        sums = [("output", base + added * output, base), ("gradient of its input", base + added * gradient, base)]
        return compiled_proof._Result(sums, [adapter * of_adapter])

    found = result(*(1 + off * (name == part) for name in ("output", "gradient", "adapter")))
    expected, near, unknown = result(1, 1, 1), result(1.01, 1.01, 1.01), result(float("nan"), 1, 1)
    assert bool(compiled_proof._difference(found, expected, expected, 0.05)) is problem
    assert bool(compiled_proof._difference(found, expected, near, 0.035)) is problem
    assert compiled_proof._difference(expected, unknown, unknown, 0.05) is None
