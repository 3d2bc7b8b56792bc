"""The table of parameter counts is exact: held against the models themselves, built without memory."""

from typing import Any

import pytest

from finetune_trainer.planning.known_models import CONFIGS
from finetune_trainer.planning.parameters import FAMILIES, count
from support.trainer.families import tiny_config

#: Types whose own defaults cannot be built.
_NO_DEFAULTS = {"ministral", "hunyuan_v1_dense", "nemotron"}


def _check(config: Any, raw: dict[str, Any] | None = None) -> None:
    import torch

    from finetune_trainer.model.architecture import model_class
    from finetune_trainer.model.counts import count_weights

    with torch.device("meta"):
        model = model_class(config).from_config(config)
    assert count(raw or config.to_dict()) == count_weights(model)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_small_model_of_each_family(kind: str) -> None:
    _check(tiny_config(kind))


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe", "gpt2"])
def test_tied_embeddings_count_once(kind: str, changes: dict[str, Any]) -> None:
    _check(tiny_config(kind, **changes))


def test_there_are_forty_published_models() -> None:
    assert len(CONFIGS) >= 40


#: Built by day; the others at night.
_DAILY = ("Llama-3.2-1B", "Gemma-2-2B", "Qwen3-30B-A3B", "Pythia-1.4B")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _DAILY else pytest.mark.nightly) for name in CONFIGS]
)
def test_published_models_are_counted_as_they_are_built(name: str) -> None:
    """config.json as it is published leaves out what is the default: the table must know."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = CONFIGS[name]
    _check(CONFIG_MAPPING[raw["model_type"]](**raw), raw)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - _NO_DEFAULTS))
def test_the_sizes_that_were_published(kind: str) -> None:
    """transformers' defaults are those of the family's first model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    _check(CONFIG_MAPPING[kind]())


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # Pythia 6.9B, StarCoder2 7B, Mixtral 8x7B, Qwen2.5 7B, Gemma 2 9B: the numbers on their cards
        ({"model_type": "gpt_neox", "vocab_size": 50432, "hidden_size": 4096, "intermediate_size": 16384,
          "num_hidden_layers": 32, "num_attention_heads": 32}, 6_857_302_016),
        ({"model_type": "starcoder2", "vocab_size": 49152, "hidden_size": 4608, "intermediate_size": 18432,
          "num_hidden_layers": 32, "num_attention_heads": 36, "num_key_value_heads": 4,
          "tie_word_embeddings": False}, 7_400_416_256),
        ({"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
          "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8},
         46_702_792_704),
        ({"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
          "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}, 7_615_616_512),
        ({"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336,
          "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
         9_241_705_984),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_the_numbers_of_known_models(config: dict[str, Any], parameters: int) -> None:
    found = count(config)
    assert found is not None
    assert found.total == parameters


def test_a_type_that_is_not_held_is_not_guessed() -> None:
    assert count({"model_type": "mamba", "hidden_size": 64}) is None
    assert count({}) is None
    assert count({"model_type": "llama"}) is None
