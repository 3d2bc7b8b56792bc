"""How much the trials of one process need: the same, whichever of them asks first."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.packing.fitting import fit
from finetune_trainer.planning.memory import adapter_weights
from finetune_trainer.planning.model_shape import ModelShape
from finetune_trainer.planning.passes import spec_of_largest

SHAPE = ModelShape(32768, 4096, 14336, layers=32, heads=32, kv_heads=8, head_dim=128)


def _spec(rank: int, *modules: str, dropout: float = 0.0, optimizer: str = "paged_adamw_8bit") -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": "hf://org/model"},
            "dataset": {"train": "s3://data/train.jsonl"},
            "training": {"batchSize": 4, "optimizer": optimizer},
            "lora": {"rank": rank, "targetModules": [*modules], "dropout": dropout},
            "output": {"uri": "s3://out"},
        }
    )


SPECS = (
    _spec(8, "q_proj", dropout=0.1),
    _spec(16, "q_proj", "down_proj", optimizer="adamw_torch"),
    _spec(4, "all-linear"),
    _spec(64, "v_proj", optimizer="adafactor"),
)


@dataclass
class _Inspected:
    """As much of a BaseModel as a plan reads here."""

    shape: ModelShape


def _asked(number: int, trials: int) -> list[tuple[Any, int | None]]:
    """Return what is planned when that trial asks: specs, and trained weights."""
    found = []

    def make(spec: FineTuneJobSpec, base: Any, **_: Any) -> ExecutionPlan:
        found.append((spec, base.shape.trained))
        rows = spec.training.batch_size
        return ExecutionPlan(micro_batch_size=rows, gradient_accumulation_steps=1, predicted_peak_memory_bytes=1)

    base: Any = _Inspected(replace(SHAPE, trained=adapter_weights(SHAPE, SPECS[number])))
    fits = fit(SPECS, trials, True, make, SPECS[number], base)
    assert fits.holds_all and fits.places == trials
    return found


@pytest.mark.parametrize("trials", [1, 2, 4])
def test_it_is_the_same_whichever_trial_asks_first(trials: int) -> None:
    """After a kill it is another one: with other places, or no room for all adapters, other trials would stop."""
    expected = _asked(0, trials)
    assert all(_asked(number, trials) == expected for number in range(1, len(SPECS)))
    each = sorted((adapter_weights(SHAPE, spec) for spec in SPECS), reverse=True)
    assert [trained for _, trained in expected] == [sum(each[:trials]), sum(each), sum(each)]


def test_the_largest_has_the_most_of_everything_that_takes_memory() -> None:
    largest = spec_of_largest(SPECS)
    assert (largest.lora.rank, largest.lora.dropout, largest.training.optimizer) == (64, 0.1, "adamw_torch")
    assert largest.lora.target_modules == ["all-linear"]
    assert spec_of_largest(SPECS[:2]).lora.target_modules == ["down_proj", "q_proj"]
    assert spec_of_largest(SPECS[:1]) == SPECS[0]
