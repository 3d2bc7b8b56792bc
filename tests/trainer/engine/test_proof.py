"""What is proven of a model as it is loaded: nothing is believed by name."""

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.data.batching import Collate
from finetune_trainer.engine import proof
from finetune_trainer.engine.proof import Findings, prove
from finetune_trainer.errors import ConfigInvalid
from support.trainer.families import tiny_model

ROWS = [
    [5, 9, 77, 31, 8, 100, 64, 12, 90, 33, 7, 21, 55, 10, 3, 88, 40, 17, 66, 29, 71, 4, 19, 52, 101, 60, 13, 37, 80]
] * 2


def _spec(**sections: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": "hf://org/base"} | sections.pop("model", {}),
            "dataset": {"train": "file:///x.jsonl"},
            "output": {"uri": "file:///out"},
            "training": {"precision": "fp32"} | sections.pop("training", {}),
        }
    )


def _prove(model: Any, packing: bool = True, attention: str = "sdpa", **sections: Any) -> Findings:
    return prove(model, _spec(**sections), ExecutionPlan(attention=attention, packing=packing), ROWS, 0)


def _loss(model: Any, rows: list[list[int]], packed: bool = False) -> torch.Tensor:
    found: torch.Tensor = model(**Collate(packed, 0, len(rows), 30)([(row, row) for row in rows]))
    return found


def _own_loss(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """What transformers computes for each row alone."""
    logits = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1] for row in rows]
    return sum(
        (
            cross_entropy(each.float(), torch.tensor(row[1:]), reduction="sum")
            for each, row in zip(logits, rows, strict=True)
        ),
        start=torch.zeros(()),
    )


#: Type of model -> attention, whether the model's own logits are needed, and whether rows pack.
KNOWN = {
    "llama": ("sdpa", False, True),
    "gemma2": ("eager", False, True),
    "gpt2": ("sdpa", False, True),
    "qwen3_moe": ("sdpa", False, True),
    "deepseek_v3": ("sdpa", False, True),
    "gemma3": ("sdpa", False, True),
    "recurrent_gemma": ("sdpa", False, False),
    "modernbert-decoder": ("sdpa", True, True),
    "llama4": ("sdpa", True, True),
    "mllama": ("sdpa", True, True),
    "xlstm": ("eager", True, False),
    "inkling_text": ("sdpa", True, False),
    "bloom": ("eager", False, False),
    "opt": ("sdpa", False, False),
    "falcon": ("sdpa", False, False),
    "falcon_h1": ("sdpa", False, False),
    "lfm2": ("sdpa", False, False),
    "mamba": ("eager", False, False),
    "qwen3_next": ("sdpa", False, False),
    "bert": ("sdpa", True, False),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_the_loss_is_the_models_own_and_rows_pack_only_where_they_do_not_see_each_other(kind: str) -> None:
    model = tiny_model(kind)
    attention, own, packs = KNOWN[kind]
    plain = copy.deepcopy(model).eval()
    findings = _prove(model, attention=attention)
    assert (findings.attention, findings.own_loss) == (attention, own)
    assert (findings.packing_problem is None) == packs
    model.eval()
    rows = [ROWS[0][:17], ROWS[0][17:]]
    expected = _own_loss(plain, rows)
    torch.testing.assert_close(_loss(model, rows), expected, rtol=1e-5, atol=1e-4)
    if packs:
        torch.testing.assert_close(_loss(model, rows, packed=True), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe", "mixtral", "gemma3", "deepseek_v3"])
def test_half_precision_is_no_leak_and_no_other_loss(kind: str) -> None:
    findings = _prove(tiny_model(kind).to(torch.bfloat16), training={"precision": "bf16"})
    assert findings == Findings("sdpa", own_loss=False)


@pytest.mark.parametrize("kind", ["falcon", "lfm2", "mamba", "opt"])
def test_half_precision_hides_no_leak(kind: str) -> None:
    model = tiny_model(kind).to(torch.bfloat16)
    findings = _prove(model, attention=model.config._attn_implementation, training={"precision": "bf16"})
    assert findings.packing_problem is not None


def test_an_encoder_is_no_causal_model() -> None:
    """It would learn to copy the next token, and report a loss near nothing."""
    with pytest.raises(ConfigInvalid, match=r"tokens see those that follow them .* need is_decoder: true"):
        _prove(tiny_model("bert", is_decoder=False))


def test_a_scale_that_no_setting_names_is_found() -> None:
    model = tiny_model("llama")
    plain = type(model).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        found.logits = found.logits * 1.02
        return found

    model.__class__ = type("Scaled", (type(model),), {"forward": scaled})
    assert _prove(model).own_loss


def test_generators_and_mode_are_as_before() -> None:
    model = tiny_model("gpt2").train()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    _prove(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_attention_that_fails_falls_back_to_one_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AttentionInterface

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no sinks here")

    AttentionInterface.register("broken", broken)
    model = tiny_model("llama")
    model.set_attn_implementation("broken")
    assert _prove(model, attention="broken").attention == "sdpa"
    assert "Attention: sdpa, for broken fails (ValueError: no sinks here)" in capsys.readouterr().out
    model.set_attn_implementation("broken")
    wanted = _spec(model={"attention": "varlen"})
    with pytest.raises(ConfigInvalid, match=r"spec.model.attention: broken fails .* take auto or sdpa"):
        prove(model, wanted, ExecutionPlan(attention="broken"), ROWS, 0)


def test_all_processes_take_what_holds_for_each() -> None:
    one, other = Findings("varlen", False), Findings("eager", True, "rows see each other")
    assert Findings.agreed([one, other]) == Findings("eager", True, "rows see each other")
    assert Findings.agreed([one, one]) == one


@pytest.mark.parametrize("rows", [[[5]], [[5, 5, 5, 5]] * 3, [[1, 2], [1, 2]]])
def test_short_and_monotonous_rows_prove_as_well(rows: list[list[int]]) -> None:
    first, second, third = proof._samples(rows)
    assert (len(first), len(second), len(third)) == (12, 12, 9)
    assert first != second
    for kind, problem in (("llama", False), ("falcon", True)):
        plan = ExecutionPlan(attention="sdpa", packing=True)
        assert bool(prove(tiny_model(kind), _spec(), plan, rows, 0).packing_problem) == problem
