"""Every causal language model type of the pinned transformers, tiny, trains a step; docs/models.md says what holds.

One of each kind runs with every test; all of them at night.
"""

import copy
import functools
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from finetune_trainer.engine.compilation import compile_layers
from finetune_trainer.engine.proof import prove
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.adapter import adapter_weights, attach_adapter, save_adapter, unreached
from finetune_trainer.model.counts import count_weights
from finetune_trainer.model.grouped_experts import multiply_grouped
from finetune_trainer.model.measure import measure
from finetune_trainer.planning.refusals import check_config
from finetune_trainer.publishing.adapter_checks import require_same
from support.trainer import family_report
from support.trainer.expert_layouts import layouts
from support.trainer.families import KINDS, causal_types, tiny_model

DAILY = frozenset(KINDS.values())
TOLD = "run python scripts/model_table.py"
#: Quantized layers, experts, Conv1D, a linear layer of its own class, and weights that kernels read.
DAILY_4_BITS = frozenset({"llama", "mixtral", "gpt2", "falcon", "mamba"})
#: Arguments by place, loops without their kernels, layers that cannot be told.
DAILY_COMPILED = frozenset({"gpt2", "mamba", "ctrl"})


def _told(kind: str) -> dict[str, str]:
    """What the table in the docs says of the type, by its columns."""
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    lines = page.partition("| Family |")[2].splitlines()
    row = next(line for line in lines if line.startswith(f"| `{kind}` |"))
    columns, cells = ([each.strip() for each in line.strip("|").split("|")] for line in (lines[0], row))
    return dict(zip(columns, cells[1:], strict=True))


def _families(daily: frozenset[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "kind", [pytest.param(kind, marks=[] if kind in daily else pytest.mark.nightly) for kind in causal_types()]
    )


@_families(DAILY)
def test_a_family_trains_with_its_own_loss_or_says_why_not(kind: str, tmp_path: Path) -> None:
    if reason := family_report.not_built(kind):
        pytest.skip(reason)
    model = tiny_model(kind)
    plain = copy.deepcopy(model).eval()
    config, weights = plain.config.to_dict(), count_weights(plain)
    multiply_grouped(model)  # transformers' own experts are what it is compared with
    try:
        findings = prove(model, family_report.SPEC, family_report.plan(model), family_report.ROWS, 0)
    except ConfigInvalid as error:
        assert kind in family_report.REFUSED, str(error)
        assert _told(kind)["Trains"].startswith("refused: ")
        return
    told = {"Trains": "own" if findings.own_loss else "yes", "Packed": "padded" if findings.packing_problem else "yes"}
    assert told.items() <= _told(kind).items(), TOLD
    core = model.eval()
    batches = family_report.batches()
    expected = family_report.own_loss(plain, findings.attention)
    torch.testing.assert_close(core(**batches["padded"]), expected, rtol=1e-4, atol=1e-3)
    if findings.packing_problem is None:
        torch.testing.assert_close(core(**batches["packed"]), expected, rtol=1e-4, atol=1e-3)
    adapted = family_report.one_step(model, kind)
    assert any(bool(each.any()) for name, each in adapted.named_parameters() if "lora_B" in name), "the step moved it"
    assert not unreached(adapted) or kind in family_report.UNREACHED, "the trainer says so when it publishes"
    save_adapter(adapted, tmp_path)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path))
    first, second = (family_report.logits(each, findings.attention) for each in (loaded, adapted.get_base_model()))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    require_same(adapter_weights(loaded), adapter_weights(adapted), "hand")
    if config["model_type"] not in causal_types():  # a part of a model, which no checkpoint is by itself
        return
    planned = measure(config, family_report.SPEC.model_copy(update={"lora": family_report.LORA}))
    if planned is not None:
        trained = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
        assert planned.counts == weights
        assert planned.trained == trained


@_families(DAILY_4_BITS)
def test_a_family_trains_in_4_bits_with_the_loss_of_its_quantized_weights(kind: str, tmp_path: Path) -> None:
    if reason := family_report.not_built(kind) or family_report.NOT_SAVED.get(kind):
        pytest.skip(reason)
    tiny_model(kind).save_pretrained(tmp_path / "base")
    try:
        check_config({"model_type": kind}, family_report.FOUR_BITS)
    except ConfigInvalid:
        assert _told(kind)["In 4 bits"] == "refused", TOLD
        return
    base = family_report.base_model(whole := tiny_model(kind), kind)
    model, plain = (family_report.load_in_4_bits(base, tmp_path / "base") for _ in range(2))
    counts = count_weights(whole)
    assert family_report.weights_in_4_bits(model) == (counts.linear, counts.experts), "what the plan reckons with"
    assert counts.linear
    try:
        findings = prove(model, family_report.FOUR_BITS, family_report.plan(model), family_report.ROWS, 0)
    except ConfigInvalid as error:
        assert kind in family_report.REFUSED, str(error)
        return
    expected = family_report.own_loss(plain.eval(), findings.attention)
    torch.testing.assert_close(model.eval()(**family_report.batches()["padded"]), expected, rtol=1e-4, atol=1e-3)
    adapted = family_report.one_step(model, kind)
    save_adapter(adapted, tmp_path / "adapter")
    loaded = attach_adapter(plain, base, family_report.LORA, tmp_path / "adapter")
    first, second = (family_report.logits(each, findings.attention) for each in (loaded, adapted.get_base_model()))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    require_same(adapter_weights(loaded), adapter_weights(adapted), "hand")


@_families(DAILY_COMPILED)
def test_a_family_computes_the_same_compiled_or_says_why_it_is_not(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := family_report.not_built(kind):
        pytest.skip(reason)
    if kind in family_report.REFUSED:
        pytest.skip("refused")
    # The graphs are those of inductor, whose kernels take a minute of g++ for a family.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    adapted, plan = family_report.to_compile(kind)
    loss, gradients = family_report.loss_and_gradients(adapted, plan)
    compiled = compile_layers(adapted, plan, family_report.example(plan), "fp32")
    expected = family_report.compiled(kind, adapted.get_base_model())
    assert _told(kind)["Compiled"] == expected, TOLD
    assert bool(compiled.compiled) is (expected == "yes")
    assert compiled.compiled or "compile" in capsys.readouterr().out
    found, theirs = family_report.loss_and_gradients(adapted, plan)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-4)
    assert theirs.keys() == gradients.keys()
    for name, each in gradients.items():
        torch.testing.assert_close(theirs[name], each, rtol=1e-3, atol=1e-4 * float(each.abs().max()), msg=name)
    torch._dynamo.reset()


def test_the_table_in_the_docs_names_every_type() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    missing = [kind for kind in causal_types() if f"| `{kind}` |" not in page]
    assert not missing, "run python scripts/model_table.py"


@pytest.mark.nightly
def test_the_docs_say_which_experts_are_quantized() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    table = page.partition("| Layout | Families |")[2]
    for layout, kinds in layouts().items():
        named = ", ".join(f"`{kind}`" for kind in kinds)
        assert f"| {layout} | {named} |" in table, "run python scripts/model_table.py"


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h", "llama4"])
def test_the_experts_of_the_docs(kind: str) -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    (found,) = layouts([kind])
    row = next(line for line in page.splitlines() if line.startswith(f"| {found} |"))
    assert f"`{kind}`" in row
