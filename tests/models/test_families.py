"""Every causal language model type of the pinned transformers, tiny, trains a step; docs/models.md says what holds.

One of each kind runs with every test; all of them at night.
"""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from finetune_trainer.engine.proof import prove
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.adapter import adapter_weights, save_adapter, unreached
from finetune_trainer.model.architecture import count_weights
from finetune_trainer.model.grouped_experts import multiply_grouped
from finetune_trainer.model.measure import measure
from finetune_trainer.publishing.adapter_checks import require_same
from support.trainer import family_report
from support.trainer.expert_layouts import layouts
from support.trainer.families import KINDS, causal_types, tiny_model

DAILY = frozenset(KINDS.values())


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in DAILY else pytest.mark.nightly) for kind in causal_types()]
)
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
        return
    core = model.eval()
    batches = family_report.batches()
    expected = family_report.own_loss(plain, findings.attention)
    torch.testing.assert_close(core(**batches["padded"]), expected, rtol=1e-4, atol=1e-3)
    if findings.packing_problem is None:
        torch.testing.assert_close(core(**batches["packed"]), expected, rtol=1e-4, atol=1e-3)
    adapted = family_report.one_step(model, kind)
    without = unreached(adapted)
    assert len(without) < sum("lora_B" in name for name, _ in adapted.named_parameters())
    assert not without or kind in family_report.UNREACHED, "the trainer says so when it publishes"
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
