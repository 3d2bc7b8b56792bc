"""Fewer kernels compute what the models' own code does, for those models alone, and leave nothing behind."""

import gc
import importlib
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch
from transformers import AutoConfig

from finetune_trainer.evaluation import fused_modules
from support.trainer.random_models import SIZES, build, prompts
from support.trainer.triton import interpreted

#: Families whose queries and keys are turned as ours are, and whose gated products are.
ROTATED = ("llama", "mistral", "qwen2", "gemma", "phi3", "stablelm")
#: Others turn neighbors or the other way, which shows when they are compared,
OTHER_NUMBERS = ("cohere", "helium", "nanochat", "ernie4_5")
#: or a part of each head, or ask in another way.
OTHER_SHAPES = ("glm", "gpt_neox", "gptj")
GATED = ("llama", "mistral", "qwen2", "qwen3")


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> Iterator[dict[str, int]]:
    """Our kernels in Triton's interpreter, or `changed` ones; how often each was called."""
    real = interpreted("decode_kernels", "evaluation")
    calls = dict.fromkeys(("rms_norm", "rotary", "silu_product"), 0)

    def counting(name: str) -> Any:
        function = changed.get(name, getattr(real, name))

        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    kernels = SimpleNamespace(can_rotate=real.can_rotate, **{name: counting(name) for name in calls})
    monkeypatch.setattr(fused_modules, "kernels", lambda device: kernels)
    monkeypatch.setattr(fused_modules, "_alike", {})
    yield calls


def code_of(model: Any) -> Any:
    """The module of transformers that holds the attention of `model`."""
    (name,) = {type(each).__module__ for each in model.modules() if type(each).__name__.endswith("Attention")}
    return sys.modules[name]


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3"])
def test_fused_modules_compute_what_the_models_own_do(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that are other than ours, as Gemma's, keep their own code; every forward is back afterwards."""
    kernels = interpreted("decode_kernels", "evaluation")
    monkeypatch.setattr(fused_modules, "kernels", lambda device: kernels)
    model, ids = build(family), torch.tensor(prompts(1))
    plain = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with fused_modules.fused(model):
            norms = [each for each in model.modules() if type(each).__name__.endswith("RMSNorm")]
            assert all(("forward" in each.__dict__) == (family != "gemma") for each in norms)
            found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == plain


def test_adapters_with_one_input_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values, and both halves of a gated product; nothing is kept of it afterwards."""
    model, ids = build("llama"), torch.tensor(prompts(1))
    inputs: list[weakref.ref[torch.Tensor]] = []
    linear = torch.nn.functional.linear

    def noted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        inputs.append(weakref.ref(x))
        return linear(x, weight)

    monkeypatch.setattr(fused_modules, "linear", noted)
    with torch.no_grad(), counted(monkeypatch):
        expected = model(input_ids=ids).logits
        with fused_modules.fused(model):
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
            assert len(inputs) == 4 * SIZES["num_hidden_layers"]
            gc.collect()
            assert not any(each() is not None for each in inputs)


def test_adapters_may_be_asked_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    part, x, other = build("llama").base_model.model.model.layers[0].self_attn, *torch.randn(2, 1, 5, 64)
    calls = [("v_proj", x), ("q_proj", x), ("q_proj", x), ("q_proj", other), ("k_proj", x), ("v_proj", other)]
    with torch.no_grad(), counted(monkeypatch):
        expected = [getattr(part, name)(each) for name, each in calls]
        forwards = [(module.__dict__, forward) for module, forward in fused_modules._adapter_forwards(part, "cpu")]
        for names, forward in forwards:
            names["forward"] = forward
        for (name, each), wanted in zip(calls, expected, strict=True):
            torch.testing.assert_close(getattr(part, name)(each), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [*ROTATED, *OTHER_NUMBERS, *OTHER_SHAPES])
def test_rotary_embeddings_are_ours_where_they_are_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family, **({"rotary_dim": 16} if family == "gptj" else {}))
    ids = torch.tensor([prompts(1)[0]] * 2)
    with torch.no_grad(), counted(monkeypatch) as calls, structlog.testing.capture_logs() as lines:
        expected = model(input_ids=ids).logits
        with fused_modules.fused(model):
            model(input_ids=ids)
            first = calls["rotary"]
            found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    ours = SIZES["num_hidden_layers"] if family in ROTATED else 0
    assert calls["rotary"] - first == ours
    assert first - ours == (family not in OTHER_SHAPES), "it is compared once, and not for each layer"
    assert any("rotary" in line["event"] for line in lines) == (family in OTHER_NUMBERS)


@pytest.mark.parametrize("family", [*GATED, "gemma", "glm"])
def test_gated_products_are_ours_where_they_are_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(family), torch.tensor(prompts(1))
    with torch.no_grad(), counted(monkeypatch) as calls:
        expected = model(input_ids=ids).logits
        with fused_modules.fused(model):
            before = calls["silu_product"]
            found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert calls["silu_product"] - before == (SIZES["num_hidden_layers"] if family in GATED else 0)


@pytest.mark.parametrize(
    ("family", "name"), [("bitnet", "BitNetMLP"), ("falcon_h1", "FalconH1MLP"), ("gemma3n", "Gemma3nTextMLP")]
)
def test_a_gated_product_with_more_to_it_keeps_its_code(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm within, multipliers, sparsity: with silu, and all that ours asks for by name."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = AutoConfig.for_model(family).get_text_config()
    config.update({"hidden_size": 64, "hidden_act": "silu", "hidden_activation": "silu"})
    config.intermediate_size = [96] * 64 if family == "gemma3n" else 96
    made = getattr(module, name)(config)
    with counted(monkeypatch), structlog.testing.capture_logs() as lines:
        kernels = fused_modules.kernels(torch.device("cuda"))
        assert made.act_fn is not None and not fused_modules._is_gated(made, kernels.silu_product)
    assert [line["event"].split(":")[0] for line in lines] == [
        "Evaluations compute gated products by the model's own kernels"
    ]


def test_a_gated_product_takes_its_input_by_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("llama"), torch.randn(1, 3, 64)
    mlp = model.base_model.model.model.layers[0].mlp
    with torch.no_grad(), counted(monkeypatch) as calls:
        expected = mlp(x)
        with fused_modules.fused(model):
            before = calls["silu_product"]
            torch.testing.assert_close(mlp(x=x), expected)
            assert calls["silu_product"] == before + 1
            with pytest.raises(TypeError):
                mlp(x, x)


def wrong_rotary(query: Any, key: Any, cos: Any, sin: Any) -> Any:
    return query * cos[:, None], key * cos[:, None]


def wrong_product(gate: Any, up: Any) -> Any:
    return gate * up


def failing(*args: Any) -> Any:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    "changed",
    [{"rotary": wrong_rotary, "silu_product": wrong_product}, {"rotary": failing, "silu_product": failing}],
)
def test_kernels_that_compute_other_numbers_are_not_used(
    changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build("llama"), torch.tensor(prompts(1))
    with torch.no_grad(), counted(monkeypatch, **changed), structlog.testing.capture_logs() as lines:
        expected = model(input_ids=ids).logits
        for _ in range(2):
            with fused_modules.fused(model):
                torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
    reason = "RuntimeError: no such instruction" if changed["rotary"] is failing else "ours gives other numbers"
    assert [line["event"] for line in lines] == [
        f"Evaluations compute {what} by the model's own kernels: {reason}"
        for what in ("gated products", "rotary embeddings")
    ]


def test_full_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([torch.OutOfMemoryError("full"), True])

    def compare() -> bool:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return bool(found)

    monkeypatch.setattr(fused_modules, "_alike", {})
    assert [fused_modules._computes_alike("kind", "norms", compare) for _ in range(3)] == [False, True, True]


def test_each_type_of_number_is_compared_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OLMo does: it turns in float32 and answers in the type of the query."""
    code: Any = importlib.import_module("transformers.models.olmo2.modeling_olmo2")
    query, key, cos, sin = (torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), *torch.randn(2, 2, 5, 16))
    with counted(monkeypatch):
        rotate = fused_modules._rotary(code.apply_rotary_pos_emb, fused_modules.kernels(torch.device("cuda")))
        for half in (False, True):
            q, k = (query.half(), key.half()) if half else (query, key)
            expected = code.apply_rotary_pos_emb(q, k, cos, sin)
            for found, each in zip(rotate(q, k, cos, sin), expected, strict=True):
                assert found.dtype == each.dtype and torch.equal(found, each)
    assert sorted(fused_modules._alike.values()) == [False, True]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_replaced(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    code, forwards = code_of(model), [dict(module.__dict__) for module in model.modules()]
    own = code.apply_rotary_pos_emb
    names = list(vars(code))
    with counted(monkeypatch):
        try:
            with fused_modules.fused(model):
                assert code.apply_rotary_pos_emb is not own
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
    assert code.apply_rotary_pos_emb is own
    assert list(vars(code)) == names
    for module, before in zip(model.modules(), forwards, strict=True):
        assert module.__dict__.keys() == before.keys()
        assert all(module.__dict__[name] is before[name] for name in before)


def test_what_is_compiled_is_not_compiled_anew_by_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are compiled once, before or after it, from the model's own code."""
    model, graphs = build("llama"), []
    layer, rotary = model.base_model.model.model.layers[0], model.base_model.model.model.rotary_emb
    x = torch.randn(1, 6, 64)
    turned = rotary(x, torch.arange(6)[None])

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer.forward, backend=backend, dynamic=False)

    def trained() -> torch.Tensor:
        return compiled(x, position_embeddings=turned)  # type: ignore[no-any-return]

    with counted(monkeypatch) as calls:
        expected = trained().detach()
        made = len(graphs)
        assert made
        with torch.no_grad(), fused_modules.fused(model):
            layer(x, position_embeddings=turned)
        before = dict(calls)
        torch.testing.assert_close(trained().detach(), expected)
        assert (len(graphs), calls) == (made, before)
    torch.compiler.reset()
