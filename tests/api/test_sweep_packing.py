"""Which trials may train in one process."""

from typing import Any

import pytest

from finetune_api.spec import FineTuneJobSpec
from finetune_api.sweep_packing import why_not_packed

SPEC: dict[str, Any] = {
    "model": {"source": "hf://org/model"},
    "dataset": {"train": "s3://data/train.jsonl"},
    "output": {"uri": "s3://out/a"},
}


def _why(*trials: tuple[str, FineTuneJobSpec]) -> str | None:
    return why_not_packed(trials)


def _spec(changes: dict[str, Any]) -> FineTuneJobSpec:
    merged = {name: SPEC[name] | changes.get(name, {}) for name in SPEC}
    return FineTuneJobSpec.model_validate(changes | merged)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"rank": 64, "alpha": 8, "dropout": 0.2, "targetModules": ["all-linear"], "rslora": True}},
        {"training": {"learningRate": 1e-3, "scheduler": "linear", "weightDecay": 0.1, "warmupRatio": 0.1, "seed": 1}},
        {"training": {"epochs": 1, "maxSteps": 10, "maxGradNorm": 0.5}, "output": {"uri": "s3://out/b"}},
    ],
)
def test_trials_may_differ_in_what_an_adapter_owns(changes: dict[str, Any]) -> None:
    assert _why(("a", _spec({})), ("b", _spec(changes))) is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"training": {"batchSize": 8}}, "training.batchSize"),
        ({"training": {"maxLength": 64}}, "training.maxLength"),
        ({"dataset": {"train": "s3://data/other.jsonl"}}, "dataset.train"),
        ({"quantization": {"bits": 16}}, "quantization.bits"),
        ({"model": {"revision": "main"}}, "model.revision"),
        ({"evaluation": {"everySteps": 7}}, "evaluation.everySteps"),
    ],
)
def test_they_share_all_else(changes: dict[str, Any], field: str) -> None:
    found = _why(("a", _spec({})), ("b", _spec(changes)))
    assert found and found.startswith(f"trial b: spec.{field} differs from that of a; packed trials differ in lora")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"resources": {"gpusPerNode": 2}}, "resources.gpusPerNode"),
        ({"quantization": {"bits": 8}}, "quantization.bits"),
        ({"training": {"precision": "fp16"}}, "training.precision"),
        ({"lora": {"dora": True}}, "lora.dora"),
        ({"lora": {"bias": "all"}}, "lora.bias"),
        ({"lora": {"embeddings": True}}, "lora.embeddings"),
        ({"lora": {"modulesToSave": ["lm_head"]}}, "lora.modulesToSave"),
        ({"output": {"artifacts": ["merged"]}}, "output.artifacts"),
        ({"activeDeadlineSeconds": 60}, "activeDeadlineSeconds"),
    ],
)
def test_some_jobs_share_with_none(changes: dict[str, Any], field: str) -> None:
    found = _why(("a", _spec(changes)), ("b", _spec(changes)))
    assert found and found.startswith(f"trial a: spec.{field}: ")


def test_a_seed_that_chooses_rows_is_shared() -> None:
    held_out = {"dataset": {"evalFraction": 0.1}}
    found = _why(("a", _spec(held_out)), ("b", _spec(held_out | {"training": {"seed": 1}})))
    assert found and found.startswith("trial b: spec.training.seed differs")
