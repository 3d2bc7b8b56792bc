"""Popular models are known by their name on the hub, instruction-tuned ones too; nothing else is guessed."""

import pytest

from finetune_trainer.planning.known_models import BY_REPOSITORY, CONFIGS, config_of
from finetune_trainer.planning.model_shape import ModelShape


def test_more_than_thirty_models_are_known_and_counted_exactly() -> None:
    known = set(BY_REPOSITORY.values())
    assert len(known) >= 45 and known <= set(CONFIGS)
    shapes = {name: ModelShape.from_config(CONFIGS[name]) for name in known}
    assert [name for name, shape in shapes.items() if shape is None or shape.counts is None] == []


@pytest.mark.parametrize(
    ("source", "layers"),
    [
        ("hf://mistralai/Mistral-7B-Instruct-v0.3", 32),
        ("hf://meta-llama/Meta-Llama-3.1-70B-Instruct", 80),
        ("hf://qwen/qwen3-30b-a3b", 48),
        ("hf://somebody/Mistral-7B-v0.3", None),
        ("s3://models/mistralai/Mistral-7B-v0.3", None),
        ("hf://mistralai/Mistral-7B-v0.3-GGUF", None),
    ],
)
def test_by_its_whole_name_and_from_the_hub_alone(source: str, layers: int | None) -> None:
    config = config_of(source)
    assert (config and config["num_hidden_layers"]) == layers


def test_memory_and_speed_are_known_of_the_same_gpus() -> None:
    from finetune_trainer.planning.speed import MEMORY_GIB, TERAFLOPS

    assert set(MEMORY_GIB) == set(TERAFLOPS)
