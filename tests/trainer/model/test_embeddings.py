"""Embeddings that train whole, and tokens that the data adds: they load back, and what cannot be is said before."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec_training import Lora
from finetune_api.status import ExecutionPlan
from finetune_trainer.engine.model_loss import patch_fused_loss
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.inputs import ModelFiles
from finetune_trainer.model.adapter import adapter_weights, attach_adapter, detach_adapter, save_adapter
from finetune_trainer.model.base import BaseModel, inspect_base_model
from finetune_trainer.model.embeddings import NewTokens, grow
from finetune_trainer.model.targets import adapter_settings
from finetune_trainer.model.weights import load_base_model
from finetune_trainer.planning.memory import adapter_weights as predicted_weights
from finetune_trainer.planning.model_shape import ModelShape
from finetune_trainer.planning.parameters import count, with_new_tokens
from support.trainer import family_report
from support.trainer.families import VOCABULARY, tiny_model

NEW = NewTokens((VOCABULARY, VOCABULARY + 1), VOCABULARY, VOCABULARY + 2)


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        ("llama", ["model.embed_tokens", "lm_head"]),
        ("gemma2", ["model.embed_tokens"]),  # tied, and stays so
        ("gpt2", ["transformer.wte", "lm_head"]),  # tied, but PEFT does not know its names
        ("bert", ["bert.embeddings.word_embeddings", "cls.predictions.decoder"]),
    ],
)
def test_grown_embeddings_train_and_load_back(kind: str, whole: list[str], tmp_path: Path) -> None:
    lora = Lora.model_validate({"targetModules": ["all-linear"], "rank": 4, "dropout": 0.0, "embeddings": True})
    model = tiny_model(kind)
    before = model.get_input_embeddings().weight.clone()
    grow(model, NEW)
    plain = copy.deepcopy(model)
    with torch.device("meta"):
        skeleton = tiny_model(kind)
    grow(skeleton, NEW)
    settings, rehearsal = adapter_settings(skeleton, lora, "org/base", None, NEW)
    assert settings.modules_to_save == whole
    base = BaseModel("org/base", None, model.config, None, None, (), True, adapter=settings)
    adapted = attach_adapter(model, base, lora)
    core = adapted.get_base_model()
    patch_fused_loss(core)
    core.fused_loss.own = kind == "bert"
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(2):
        adapted.train()(**family_report.batches()["padded"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(adapted, tmp_path)
    weights = adapter_weights(adapted)
    assert {name: tuple(each.shape) for name, each in weights.items()} == rehearsal.tensors
    trained = family_report.logits(core, "eager")
    assert (core.get_output_embeddings().weight is core.get_input_embeddings().weight) == (kind == "gemma2")
    loaded = PeftModel.from_pretrained(plain, str(tmp_path))
    torch.testing.assert_close(family_report.logits(loaded, "eager"), trained, rtol=0, atol=0)
    # What verification loads the adapter on is the base as it was, not the trained embeddings left in it.
    bare = detach_adapter(adapted)
    torch.testing.assert_close(bare.get_input_embeddings().weight[:VOCABULARY], before, rtol=0, atol=0)


def _spec(tiny_model: Path, lora: dict[str, Any], tokens: list[str]) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": f"file://{tiny_model}"},
            "dataset": {"train": "file:///x.jsonl", "addTokens": tokens},
            "output": {"uri": "file:///out"},
            "training": {"maxLength": 64},
            "lora": lora,
        }
    )


@pytest.mark.parametrize("bits", [4, 16])
def test_new_tokens_begin_as_the_mean_of_the_others(
    bits: int, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = _spec(tiny_model, {"embeddings": True}, ["<a>", "<b>", "<a>", "</s>"])
    spec = spec.model_copy(update={"quantization": spec.quantization.model_copy(update={"bits": bits})})
    base = inspect_base_model(ModelFiles(tiny_model, None), spec)
    known = base.config.vocab_size
    assert base.new_tokens == NewTokens((known, known + 1), known, known + 2), (
        "one is there already, one is named twice"
    )
    model = load_base_model(tiny_model, base, spec, ExecutionPlan(attention="sdpa"), "cpu")
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert table.shape[0] == known + 2
        mean = table[:known].float().mean(0).to(table.dtype)
        assert torch.equal(table[known:], torch.stack([mean, mean]))
    assert f"2 embeddings are new; each begins as the mean of the {known} others" in capsys.readouterr().out


def test_the_plan_counts_them(tiny_model: Path) -> None:
    spec = _spec(tiny_model, {"embeddings": True}, ["<a>", "<b>"])
    base = inspect_base_model(ModelFiles(tiny_model, None), spec)
    config = base.config.to_dict()
    foretold = ModelShape.from_config(with_new_tokens(config, 2))
    assert base.shape is not None
    assert foretold is not None
    assert count(with_new_tokens(config, 2)) == base.shape.counts
    assert predicted_weights(foretold, spec) == predicted_weights(base.shape, spec)


def test_a_table_with_rows_to_spare_keeps_its_size() -> None:
    model = tiny_model("llama")
    grow(model, NewTokens((120, 121), 120, 122))
    table = model.get_input_embeddings().weight
    assert table.shape[0] == VOCABULARY
    assert torch.equal(table[120], table[121])
    torch.testing.assert_close(table[120], table[:120].mean(0))


def test_new_tokens_whose_embeddings_do_not_train_are_refused(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ModelFiles(tiny_model, None)
    with pytest.raises(ConfigInvalid, match=r"addTokens: the embeddings of this model are model.embed_tokens, which"):
        inspect_base_model(files, _spec(tiny_model, {"modulesToSave": ["lm_head"]}, ["<a>"]))
    inspect_base_model(files, _spec(tiny_model, {"modulesToSave": ["embed_tokens"]}, ["<a>"]))
    assert "lm_head is not trained, so that the model does not learn to say the new tokens" in capsys.readouterr().out
