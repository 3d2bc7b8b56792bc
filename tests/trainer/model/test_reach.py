"""What no gradient of text reaches gets no adapter: found on a model without memory, and never guessed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from finetune_api.spec_training import Lora
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.adapter import load_adapter_weights, save_adapter
from finetune_trainer.model.architecture import linear_layers
from finetune_trainer.model.reach import unreached, unreached_layers
from support.trainer.families import tiny_model

ALL = Lora.model_validate({"targetModules": ["all-linear"]})


def _skeleton(kind: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return tiny_model(kind, **changes)


def _without(kind: str, **changes: Any) -> list[str]:
    model = _skeleton(kind, **changes)
    return unreached_layers(model, linear_layers(model))


@pytest.mark.parametrize(
    ("kind", "part", "how_many"),
    [
        ("deepseek_v32", ".indexer.", 6),
        ("bart", ".encoder_attn.", 8),
        ("git", ".image_encoder.|.visual_projection.", 13),
        ("deepseek_v4", ".compressor.indexer.", 4),  # the compressor itself is for rows that are long enough
    ],
)
def test_layers_that_text_does_not_go_through_are_found(kind: str, part: str, how_many: int) -> None:
    found = _without(kind)
    assert len(found) == how_many
    assert all(any(each in f".{name}" for each in part.split("|")) for name in found)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "doge", "gemma3n_text", "llama4", "bert", "gemma3"])
def test_what_a_gradient_reaches_is_never_left_out(kind: str) -> None:
    assert _without(kind) == []


def test_layers_that_are_dropped_by_chance_are_reached_another_time() -> None:
    assert _without("bart", decoder_layerdrop=1.0) == _without("bart")


def test_where_it_cannot_be_told_nothing_is_left_out() -> None:
    """Code that looks at numbers, kernels that are missing, and a model that does not compute at all."""
    assert _without("dbrx") == _without("qwen3_next") == []
    broken = _skeleton("bart")
    broken.model.decoder.forward = None
    assert unreached_layers(broken, linear_layers(broken)) == []


def test_the_model_stays_as_it_was() -> None:
    model = _skeleton("deepseek_v32")
    before = (model.config.to_dict(), model.config._attn_implementation, model.training)
    trained = [each.requires_grad for each in model.parameters()]
    unreached(model, ALL, linear_layers(model))
    assert before == (model.config.to_dict(), model.config._attn_implementation, model.training)
    assert trained == [each.requires_grad for each in model.parameters()]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("lora", "wanted"),
    [
        ({"targetModules": ["wq_b", "weights_proj"]}, "targetModules: no gradient of text reaches wq_b, weights_proj"),
        ({"targetPattern": r".*\.indexer\..*"}, r"targetPattern: no gradient of text reaches .*\.indexer\..*; it"),
    ],
)
def test_nothing_but_those_layers_is_refused(lora: dict[str, Any], wanted: str) -> None:
    model = _skeleton("deepseek_v32")
    with pytest.raises(ConfigInvalid) as refused:
        unreached(model, Lora.model_validate(lora), linear_layers(model))
    assert f"spec.lora.{wanted}" in str(refused.value)
    assert str(refused.value).endswith("o_proj, q_a_proj, q_b_proj, up_proj")


def test_an_adapter_made_elsewhere_may_have_them_as_long_as_they_do_nothing(tmp_path: Path) -> None:
    from finetune_trainer.model.targets import adapter_settings

    settings, _ = adapter_settings(_skeleton("bart"), ALL, "org/base", None)
    theirs = copy.deepcopy(settings)
    theirs.exclude_modules = None
    other = get_peft_model(tiny_model("bart"), theirs)
    name, second = next((n, p) for n, p in other.named_parameters() if ".self_attn." in n and "lora_B" in n)
    torch.nn.init.ones_(second)
    save_adapter(other, tmp_path)
    ours = get_peft_model(tiny_model("bart"), copy.deepcopy(settings))
    load_adapter_weights(ours, tmp_path)
    assert dict(ours.named_parameters())[name].eq(1).all()
    torch.nn.init.ones_(next(p for n, p in other.named_parameters() if ".encoder_attn." in n and "lora_B" in n))
    save_adapter(other, tmp_path)
    with pytest.raises(ConfigInvalid, match=r"its layers differ, for example at .*encoder_attn"):
        load_adapter_weights(ours, tmp_path)
