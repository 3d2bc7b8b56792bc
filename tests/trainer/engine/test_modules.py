"""Which modules are the decoder layers: all of them, in order, none twice, and none that text does not go through."""

import pytest
import torch

from finetune_trainer.engine.modules import decoder_layers, repeated_layers
from finetune_trainer.errors import ConfigInvalid
from support.trainer.families import tiny_model


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ["LlamaDecoderLayer"] * 2),
        ("qwen2_vl", ["Qwen2VLDecoderLayer"] * 2),  # the vision tower comes first, and is left out
        ("gemma3", ["Gemma3DecoderLayer"] * 2),
        ("mamba", ["MambaBlock"] * 2),  # whose mixer must not be split either
        ("zamba2", ["Zamba2MambaDecoderLayer", "Zamba2HybridLayer"] * 2),
        ("bert", ["BertLayer"] * 2),  # nor its embeddings
        ("biogpt", ["BioGptDecoderLayer"] * 2),  # whose code names none
    ],
)
def test_the_layers_of_the_language_part(kind: str, names: list[str]) -> None:
    with torch.device("meta"):
        model = tiny_model(kind)
    assert [type(each).__name__ for each in decoder_layers(model)] == names


def test_all_layers_of_a_multimodal_model_are_sharded() -> None:
    with torch.device("meta"):
        model = tiny_model("qwen2_vl")
    found = {type(each).__name__ for each in repeated_layers(model, model._no_split_modules)}
    assert found == {"Qwen2VLVisionBlock", "Qwen2VLDecoderLayer"}


def test_code_of_others_may_say_what_its_layers_are() -> None:
    class Block(torch.nn.Linear):
        pass

    part = torch.nn.Sequential(Block(2, 2), torch.nn.Sequential(Block(2, 2)))
    assert repeated_layers(part, ["Block"]) == [part[0], part[1][0]]
    with pytest.raises(ConfigInvalid, match="does not name its layers"):
        repeated_layers(part, None)
