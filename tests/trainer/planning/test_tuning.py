"""Tiles are tried out for trainings of hours alone."""

import pytest

from finetune_api.spec_training import Training
from finetune_trainer.planning.model_shape import ModelShape
from finetune_trainer.planning.tuning import pays

MISTRAL = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "model_type": "mistral",
}


@pytest.mark.parametrize(
    ("training", "rows", "expected"),
    [
        ({}, 10_000, False),
        ({"epochs": 60}, 10_000, False),
        ({"epochs": 100}, 10_000, True),
        ({}, 300_000, True),
        ({"maxSteps": 1875}, 300_000, False),
        ({"maxSteps": 50_000}, 100, True),
    ],
)
def test_the_recipe_of_eight_minutes_is_not_tuned_for(training: dict[str, int], rows: int, expected: bool) -> None:
    shape = ModelShape.from_config(MISTRAL)
    assert pays(Training.model_validate(training), [325] * rows, shape) is expected
    assert not pays(Training.model_validate(training), [325] * rows, None)
