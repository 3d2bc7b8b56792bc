"""From a sweep's spec to its trials: deterministic, named, and checked."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api import sweep_paths
from finetune_api.sweep import MAX_TRIALS, FineTuneSweepSpec
from finetune_api.sweep_trials import SweepError, expand, trial_spec
from support.simulation.sweep_world import TEMPLATE


def spec(**given: Any) -> FineTuneSweepSpec:
    return FineTuneSweepSpec.model_validate({"template": TEMPLATE} | given, by_alias=True)


def grid(**values: list[Any]) -> list[dict[str, Any]]:
    return [{"path": path.replace("_", "."), "values": found} for path, found in values.items()]


def test_a_grid_is_every_combination_named_after_its_values():
    trials = expand("nli", spec(parameters=grid(training_learningRate=[1e-4, 0.05], lora_rank=[8, 16])))
    assert [trial.name for trial in trials] == ["lr1e-4-r8", "lr1e-4-r16", "lr5e-2-r8", "lr5e-2-r16"]
    assert trials[1].values == {"training.learningRate": 1e-4, "lora.rank": 16}
    assert trials[1].summary == "learningRate=1e-4 rank=16"


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        (grid(training_seed=[1, 1, 2]), ["s1", "s2"]),
        (grid(lora_dora=[True, False]), ["don", "doff"]),
        (grid(training_scheduler=["cosine", "linear"]), ["s-cosine", "s-linear"]),
        (grid(lora_targetModules=[["q_proj"], ["all-linear"]]), ["t0", "t1"]),
        (grid(model_revision=["a" * 60, "b"]), ["t0", "t1"]),
        (grid(training_scheduler=["cosine"], training_seed=[7]), ["scheduler-cosine-seed7"]),
    ],
)
def test_names_are_numbers_where_values_make_none(parameters: Any, names: list[str]):
    assert [trial.name for trial in expand("nli", spec(parameters=parameters))] == names


def test_random_draws_are_the_same_for_a_seed_within_their_bounds_and_different():
    parameters = [
        {"path": "training.learningRate", "min": 1e-5, "max": 1e-3, "scale": "log"},
        {"path": "lora.rank", "min": 4, "max": 64, "scale": "log"},
        {"path": "lora.dropout", "min": 0, "max": 0.2},
        {"path": "training.scheduler", "values": ["cosine", "linear"]},
    ]
    first = expand("nli", spec(strategy="random", maxTrials=50, parameters=parameters))
    assert first == expand("nli", spec(strategy="random", maxTrials=50, seed=42, parameters=parameters))
    assert first != expand("nli", spec(strategy="random", maxTrials=50, seed=1, parameters=parameters))
    assert [t.values for t in expand("nli", spec(strategy="random", maxTrials=60, parameters=parameters))][:50] == [
        t.values for t in first
    ]
    for trial in first:
        assert 1e-5 <= trial.values["training.learningRate"] <= 1e-3
        assert isinstance(trial.values["lora.rank"], int) and 4 <= trial.values["lora.rank"] <= 64
        assert 0 <= trial.values["lora.dropout"] <= 0.2
    below = sum(trial.values["training.learningRate"] < 1e-4 for trial in first)
    assert 15 <= below <= 35, "log: half of them in the lower decade"
    assert first[0].name == "t00" and len({str(trial.values) for trial in first}) == 50


def test_a_space_with_fewer_values_gives_fewer_trials():
    trials = expand("nli", spec(strategy="random", maxTrials=10, parameters=grid(lora_rank=[8, 16])))
    assert sorted(trial.values["lora.rank"] for trial in trials) == [8, 16]


def test_places_follow_the_trial():
    template = TEMPLATE | {"checkpoint": {"uri": "s3://scratch/{name}/"}}
    [trial] = expand("nli", spec(trials=[{"name": "a", "values": {"evaluation.earlyStopping": {"patience": 2}}}]))
    made = trial_spec("nli", template, trial)
    assert made["output"]["uri"] == "s3://adapters/nli/a/"
    assert made["checkpoint"]["uri"] == "s3://scratch/nli/a/"
    assert made["evaluation"] == {"earlyStopping": {"patience": 2}}
    assert "evaluation" not in template


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("learningRate", "did you mean training.learningRate?"),
        ("training.lr", "did you mean training.learningRate?"),
        ("trainig.learningRate", "did you mean training.learningRate?"),
        ("lora.rnk", "did you mean lora.rank?"),
        ("output.uri", "output.uri cannot vary: each trial publishes to"),
        ("checkpoint.uri", "checkpoint.uri cannot vary"),
        ("suspend", "suspend the sweep instead"),
        ("nothing.like.it", "is no field of a FineTuneJob's spec"),
    ],
)
def test_a_wrong_path_is_explained(path: str, says: str):
    with pytest.raises(SweepError, match="parameters") as refused:
        expand("nli", spec(parameters=[{"path": path, "values": [1]}]))
    assert says in refused.value.message


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"parameters": grid(lora_rank=list(range(40)), lora_alpha=list(range(40)))}, "1600 combinations"),
        ({"parameters": [{"path": "lora.rank"}]}, "give either values, or min and max"),
        (
            {"parameters": [{"path": "lora.rank", "min": 8.2, "max": 8.8}], "strategy": "random", "maxTrials": 2},
            "lora.rank takes whole numbers, and there is none from 8.2 to 8.8",
        ),
        ({"trials": [{"name": "a", "values": {"lora": {"rank": 4}, "lora.alpha": 8}}]}, "lora.alpha lies in lora"),
        ({"trials": [{"name": "a" * 40}]}, "beside the sweep's name"),
        (
            {"parameters": grid(evaluation_everySteps=[250]), "earlyStopping": {"rungs": [250]}},
            "cannot vary with earlyStopping",
        ),
    ],
)
def test_what_makes_no_trials_is_explained(given: Any, says: str):
    with pytest.raises(SweepError) as refused:
        expand("a-sweep-name", spec(**given))
    assert says in refused.value.message


def test_every_path_can_be_set_and_none_that_the_sweep_decides():
    assert {"training.learningRate", "lora", "dataset.train", "evaluation.earlyStopping.patience"} <= set(
        sweep_paths.known_paths()
    )
    assert not [path for path in sweep_paths.known_paths() if path.startswith(("output", "suspend"))]


@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.floats(1e-9, 1), st.floats(1.5, 100))
def test_draws_never_leave_their_bounds(seed: int, count: int, low: float, factor: float):
    bounds = {"min": low, "max": low * factor, "scale": "log"}
    parameters = [{"path": "training.learningRate", **bounds}]
    trials = expand("nli", spec(strategy="random", maxTrials=count, seed=seed, parameters=parameters))
    assert 1 <= len(trials) <= min(count, MAX_TRIALS)
    assert all(low <= trial.values["training.learningRate"] <= low * factor for trial in trials)
    assert len({trial.name for trial in trials}) == len(trials)


def test_a_trial_is_the_same_however_often_it_is_made():
    [trial] = expand("nli", spec(trials=[{"name": "a", "values": {"checkpoint": {"uri": "s3://kept/{name}"}}}]))
    first, again = (trial_spec("nli", TEMPLATE, trial) for _ in range(2))
    assert first["checkpoint"]["uri"] == again["checkpoint"]["uri"] == "s3://kept/nli/a/"
