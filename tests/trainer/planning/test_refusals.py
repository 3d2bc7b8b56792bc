"""What config.json alone rules out, a plan says ahead in the trainer's own words."""

from typing import Any

import pytest

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.planning.refusals import LAYERS, check_config


def _spec(**sections: Any) -> FineTuneJobSpec:
    needed = {"model": {"source": "hf://org/x"}, "dataset": {"train": "s3://data/x"}, "output": {"uri": "s3://data/o"}}
    return FineTuneJobSpec.model_validate(needed | sections)


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("config", "sections", "sentence"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, {}, "is quantized already, with awq; take the original"),
        ({"quantization_config": BNB}, {"quantization": {"bits": 16}}, "spec.quantization.bits: 16, but the weights"),
        ({"max_position_embeddings": 256}, {}, "spec.training.maxLength: 512 is more than the 256 positions of hf://"),
        ({"text_config": {"max_position_embeddings": 256}}, {}, "more than the 256 positions"),
        ({"model_type": "falcon"}, {"quantization": {"bits": 8}}, "type falcon train in 4 or 16 bits only: their code"),
        ({"model_type": "rwkv"}, {}, "spec.quantization.bits: 4, but models of type rwkv train in 16 bits only: their"),
    ],
)
def test_a_model_that_cannot_be_is_refused(config: dict[str, Any], sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigInvalid, match=sentence):
        check_config(config, _spec(**sections))


def test_a_model_that_can_be_is_not() -> None:
    check_config({"quantization_config": BNB, "max_position_embeddings": 512}, _spec())
    check_config({"model_type": "falcon"}, _spec())


@pytest.mark.parametrize("kind", LAYERS)
def test_the_names_of_layers_are_those_of_the_models(kind: str) -> None:
    import torch

    from finetune_trainer.model.architecture import linear_layers
    from support.trainer.families import tiny_model

    with torch.device("meta"):
        found = {name.rpartition(".")[2] for name in linear_layers(tiny_model(kind))}
    assert sorted(found) == LAYERS[kind].split()


def test_a_layer_that_the_type_does_not_have_is_refused_ahead() -> None:
    with pytest.raises(ConfigInvalid, match="'q_proj' is no linear layer of this model; it has down_proj, gate_up_pro"):
        check_config({"model_type": "phi3"}, _spec())
    check_config({"model_type": "phi3"}, _spec(lora={"targetModules": ["all-linear"]}))
    check_config({"model_type": "phi3"}, _spec(lora={"targetModules": ["model.layers.0.self_attn.qkv_proj"]}))
    check_config({"model_type": "brand_new"}, _spec())
