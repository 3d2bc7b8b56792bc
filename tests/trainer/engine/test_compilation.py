"""Layers that are checkpointed or compiled train alike, and packed rows never see each other."""

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune_api.status import ExecutionPlan
from finetune_trainer.data.batching import Collate
from finetune_trainer.engine import (
    compilation,
    modules,
)
from finetune_trainer.engine.lora import share_lora_inputs
from finetune_trainer.engine.model_loss import patch_fused_loss
from finetune_trainer.model.weights import keep_weights_trainable
from support.trainer.tiny_model import build_model


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("deep"), layers=4)


def _adapted(folder: Path, bits: int = 16, dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=four_bits if bits == 4 else None
    )
    keep_weights_trainable(base)
    base.config.use_cache = False
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False, task_type="CAUSAL_LM"))
    patch_fused_loss(model.get_base_model())
    return model.train()


def _plan(**settings: Any) -> ExecutionPlan:
    return ExecutionPlan(**settings)


def _batch(*lengths: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in lengths]
    return Collate(True, 0, rows=4, longest=60)([(row, row) for row in rows])


def _loss_and_gradient(model: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointed", [1, 3, None])
def test_checkpointed_layers_run_twice_and_change_nothing(checkpointed: int | None, deep_model: Path) -> None:
    model = _adapted(deep_model)
    runs: list[int] = []
    for index, layer in enumerate(modules.decoder_layers(model.get_base_model())):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    found = []
    for plan in (_plan(), _plan(gradient_checkpointing=True, checkpointed_layers=checkpointed)):
        compilation.compile_layers(model, plan, _batch(5), "fp32")
        runs.clear()
        found.append(_loss_and_gradient(model, _batch(20, 31)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert sorted(runs) == sorted([*range(4), *range(4 if checkpointed is None else checkpointed)])


@pytest.fixture
def compiler() -> Iterator[None]:
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.simdlen": 1}):  # g++ takes half the time
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
def test_compiled_layers_have_the_same_gradient_and_are_compiled_once_for_all_lengths(deep_model: Path) -> None:
    # Without a mask of tokens x tokens, as on a GPU; what the attention computes is no matter here.
    model = _adapted(deep_model)
    model.get_base_model().config._attn_implementation = "one_sequence"
    batches = [_batch(20, 31), _batch(9, 8, 40), _batch(60)]
    compilation.compile_layers(model, _plan(), batches[0], "fp32")
    plain = [_loss_and_gradient(model, batch) for batch in batches]

    chosen = _plan(compiled=True, gradient_checkpointing=True, checkpointed_layers=2)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    plan = compilation.compile_layers(model, chosen, _batch(5, 7), "fp32")
    assert plan.compiled
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs - before == 2, "that of a layer, and that of the loss"
    for (loss, gradient), batch in zip(plain, batches, strict=True):
        ours = _loss_and_gradient(model, batch)
        assert ours[0] == pytest.approx(loss, rel=1e-5)
        assert float((ours[1] - gradient).norm() / gradient.norm()) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def _one_sequence(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return found.transpose(1, 2), None


@pytest.fixture(autouse=True)
def _attention_without_a_mask() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("one_sequence", _one_sequence)
    AttentionMaskInterface.register("one_sequence", lambda *args, **kwargs: None)


@pytest.mark.parametrize("embedded", [torch.ones(1, 6, 4), {"main": (torch.ones(1, 6, 4),) * 2}, None, torch.ones(6)])
def test_embedded_positions_come_in_every_form(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V2 passes one tensor, DeepSeek-V4 a dict: what is not marked would be compiled for each length."""
    marked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda tensor, dimension: marked.append(tensor))
    hidden = torch.ones(1, 6, 8)
    layer = compilation._compiled(lambda hidden_states, position_embeddings: hidden_states, [])
    assert layer(hidden, position_embeddings=embedded) is hidden
    expected = {"Tensor": 1, "dict": 2}.get(type(embedded).__name__, 0) if embedded is None or len(embedded) == 1 else 0
    assert len(marked) == 1 + expected


@pytest.mark.parametrize("one_graph", [True, False])
def test_the_first_layer_that_trains_shares_the_graph_of_those_above(
    one_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch compiles anew for an input without a gradient, which takes as long as all the rest."""
    asked: list[bool] = []

    def compiled(function: Any) -> Any:
        def forward(hidden: torch.Tensor) -> Any:
            asked.append(hidden.requires_grad)
            return function(hidden)

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compilation, "configure_compiler", lambda budget: None)
    layers = [torch.nn.Linear(4, 4).requires_grad_(index > 0) for index in range(3)]
    results = []
    for share in (False, one_graph):
        asked.clear()
        compilation.configure_layers(layers, checkpointed=1, compiled=True, one_graph=share)
        output = torch.ones(1, 6, 4)
        for layer in layers:
            layer.zero_grad()
            output = layer(output)
        output.sum().backward()
        results.append([output.detach(), *(each.weight.grad for each in layers[1:])])
    assert asked == [False, one_graph, True], "below what trains there is no backward pass at all"
    assert layers[0].weight.grad is None
    assert all(torch.equal(mine, plain) for mine, plain in zip(*results, strict=True))


def test_layers_that_cannot_be_compiled_train_as_they_are(
    deep_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(function: Any, **options: Any) -> Any:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no compiler today\nand a long story")

        return fail

    model = _adapted(deep_model)
    compilation.compile_layers(model, _plan(), _batch(5), "fp32")
    expected = _loss_and_gradient(model, _batch(20, 31))
    monkeypatch.setattr(torch, "compile", broken)
    before = torch.get_rng_state()
    plan = compilation.compile_layers(model, _plan(compiled=True), _batch(5), "fp32")
    assert plan.compiled is False
    assert model.get_base_model().fused_loss.compiled is False
    assert "torch.compile failed, running eager (slower): RuntimeError: no compiler today" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    found = _loss_and_gradient(model, _batch(20, 31))
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_laid_end_to_end_never_see_each_other(attention: str, deep_model: Path) -> None:
    model = _adapted(deep_model)
    model.set_attn_implementation(attention)
    batch = _batch(20, 31, 9)
    changed = dict(batch, input_ids=batch["input_ids"].clone())
    changed["input_ids"][0, 20:51] = 7
    with torch.no_grad():
        before, after = (model(**{key: each[key] for key in ("input_ids", "position_ids")}).logits[0]
                         for each in (batch, changed))  # fmt: skip
    assert torch.equal(before[:20], after[:20]) and torch.equal(before[51:], after[51:])
    assert not torch.equal(before[20:51], after[20:51])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("recomputed", [0, pytest.param(2, marks=pytest.mark.nightly)])
def test_selective_checkpointing_keeps_what_linear_layers_answer(
    recomputed: int, deep_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it drops, when it computes again, what it dropped before. Inductor's partitioner decides, so none of its
    code is generated.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    model = _adapted(deep_model, bits=4, dropout=0.5)
    model.get_base_model().config._attn_implementation = "one_sequence"
    share_lora_inputs(model)
    found, kept = [], []
    for selective in (False, True):
        torch._dynamo.reset()
        plan = _plan(
            compiled=True,
            selective_checkpointing=selective,
            gradient_checkpointing=selective and bool(recomputed),
            checkpointed_layers=recomputed if selective else 0,
        )
        assert compilation.compile_layers(model, plan, _batch(5, 7), "fp32", budget=0.8).compiled
        kept.append({})

        def keep(tensor: torch.Tensor, tensors: dict[int, torch.Tensor] = kept[-1]) -> torch.Tensor:
            tensors[tensor.data_ptr()] = tensor
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append(_loss_and_gradient(model, _batch(50, 60)))
    (expected, theirs), (loss, ours) = found
    assert loss == pytest.approx(expected, rel=1e-6)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    most, fewer = (sum(tensor.nbytes for tensor in each.values()) for each in kept)
    assert fewer < 0.9 * most
    wide = [tensor for tensor in kept[1].values() if tensor.shape[-1:] == (model.config.intermediate_size,)]
    assert len(wide) >= 2 * (4 - recomputed)  # gate and up of every layer
