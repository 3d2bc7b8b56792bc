"""What Optuna draws for a trial: valid values of its own, the same for the same results."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api import manifest
from finetune_api.spec_pack import Objective
from finetune_api.sweep import Parameter
from finetune_api.sweep_tpe import Past, suggest
from finetune_api.sweep_trials import SweepError

SPACE = [
    Parameter(path="training.learningRate", min=1e-5, max=1e-1, scale="log"),
    Parameter(path="training.batchSize", min=2.5, max=9),
    Parameter(path="lora.targetModules", values=[["q_proj"], ["v_proj"], ["q_proj"]]),
    Parameter(path="lora.rslora", values=[True, False]),
]


def _suggest(history: list[Past], space: list[Parameter] = SPACE, seed: int = 42, why: Any = lambda values: "") -> Any:
    return suggest(space, Objective(), seed, history, why)


def test_draws_are_fields_values_within_their_bounds_and_all_different() -> None:
    history: list[Past] = []
    for _ in range(12):
        values = _suggest(history)
        assert values == _suggest(list(history)), "pure"
        assert json.loads(json.dumps(values)) == values
        assert 1e-5 <= values["training.learningRate"] <= 1e-1
        assert type(values["training.batchSize"]) is int and 3 <= values["training.batchSize"] <= 9
        assert values["lora.targetModules"] in (["q_proj"], ["v_proj"]) and values["lora.rslora"] in (True, False)
        assert values not in [past.values for past in history]
        state = ("succeeded", "behind", "lost", "running")[len(history) % 4]
        history.append(Past(values, state, 1.0 if state == "succeeded" else None))  # type: ignore[arg-type]
    assert _suggest([], seed=1) != _suggest([])


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_later_draws_are_where_the_best_were(direction: str) -> None:
    history: list[Past] = []
    for _ in range(25):
        values = suggest(SPACE, Objective.model_validate({"direction": direction}), 42, history, lambda values: "")
        history.append(Past(values, "succeeded", float(values["training.batchSize"])))
    later = sum(past.values["training.batchSize"] for past in history[-8:]) / 8
    assert later < 5 if direction == "minimize" else later > 7


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"training.learningRate": "x", "training.batchSize": 3, "lora.targetModules": ["q_proj"], "lora.rslora": True},
        {
            "training.learningRate": 1e-3,
            "training.batchSize": 99,
            "lora.targetModules": ["q_proj"],
            "lora.rslora": True,
        },
        {"training.learningRate": 1e-3, "training.batchSize": True, "lora.targetModules": 1, "lora.rslora": [1]},
    ],
)
def test_values_that_are_none_of_the_space_are_left_out(values: dict[str, Any]) -> None:
    assert _suggest([Past(values, "succeeded", float("nan")), Past(values, "succeeded", 0.1)])


def test_a_small_space_is_tried_out_before_anything_comes_again() -> None:
    history: list[Past] = []
    for _ in range(4):
        history.append(Past(_suggest(history, SPACE[2:]), "succeeded", 0.5))
    assert len({json.dumps(dict(past.values)) for past in history}) == 4
    assert _suggest(history, SPACE[2:]) in [past.values for past in history]


def test_where_nothing_is_valid_it_says_why() -> None:
    with pytest.raises(SweepError, match=r"spec\.parameters: no values that a FineTuneJob takes were found: too much"):
        _suggest([], why=lambda values: "too much")


def _sweep(folder: Path, parameters: list[Parameter]) -> Path:
    template = {
        "model": {"source": "hf://org/model"},
        "dataset": {"train": "s3://data/train.jsonl", "eval": "s3://data/eval.jsonl"},
        "output": {"uri": "s3://out"},
    }
    spec = {"template": template, "strategy": "tpe", "maxTrials": 5}
    spec |= {"parameters": [each.model_dump(by_alias=True, exclude_none=True) for each in parameters]}
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneSweep", "metadata": {"name": "nli"}, "spec": spec}
    (folder / "sweep.yaml").write_text(json.dumps(body))
    return folder / "sweep.yaml"


def test_bounds_and_values_are_checked_before_anything_runs(tmp_path: Path) -> None:
    wrong = [Parameter(path="lora.rank", min=0, max=8), Parameter(path="lora.dropout", values=[0.1, 2])]
    [document] = manifest.parse(_sweep(tmp_path, wrong).read_text(), "sweep.yaml")
    with pytest.raises(manifest.ManifestError) as refused:
        manifest.check_sweep(document)
    told = str(refused.value)
    assert "a trial of rank=0 dropout=0.1: spec.lora.rank: Invalid value: 0" in told
    assert "dropout=2: spec.lora.dropout: Invalid value: 2" in told


def test_one_process_does_not_take_it(tmp_path: Path) -> None:
    with pytest.raises(manifest.ManifestError, match=r"cannot share a process: spec\.strategy: tpe draws"):
        manifest.load_sweep(_sweep(tmp_path, SPACE))
