"""What the definition of sweeps promises, on the real API server and on the stand-in, and by the models alike."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api import constants, manifest
from finetune_api.sweep import FineTuneSweep
from support.server.client import ApiError, Kube, Object
from support.server.server import Cluster
from support.simulation.sweep_world import TEMPLATE

RATES = [{"path": "training.learningRate", "values": [1e-4, 2e-4]}]
DRAWN = {"parameters": [{"path": "training.learningRate", "min": 1e-5, "max": 1e-3, "scale": "log"}]}
NAMED = {"trials": [{"name": "a", "values": {"lora.rank": 8}}, {"name": "b"}]}
ACCEPTED: list[dict[str, Any]] = [
    {"parameters": RATES},
    {"parameters": [{"path": "lora.targetModules", "values": [["q_proj"], "x", True, {"a": 1}]}]},
    {**DRAWN, "strategy": "random", "maxTrials": 3, "seed": 7},
    {**DRAWN, "strategy": "tpe", "maxTrials": 3, "seed": 7},
    NAMED,
    {**NAMED, "earlyStopping": {"rungs": [250, 500]}, "parallelism": 1000, "suspend": True},
    {"parameters": RATES, "objective": {"metric": "trainLoss", "direction": "maximize"}},
    {"parameters": RATES, "packing": "enabled"},
    {**NAMED, "packing": "disabled"},
]
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "spec.parameters", "give either parameters or trials"),
    ({"parameters": RATES, **NAMED}, "spec.parameters", "give either parameters or trials"),
    (DRAWN, "spec.strategy", "grid needs values for every parameter"),
    ({**NAMED, "strategy": "random", "maxTrials": 2}, "spec.strategy", "random and tpe draw from parameters"),
    ({**NAMED, "strategy": "tpe", "maxTrials": 2}, "spec.strategy", "random and tpe draw from parameters"),
    ({**DRAWN, "strategy": "random"}, "spec.maxTrials", "is needed by strategy random"),
    ({**DRAWN, "strategy": "tpe"}, "spec.maxTrials", "is needed by strategy random and by tpe"),
    ({"parameters": RATES, "maxTrials": 2}, "spec.maxTrials", "random and by tpe, and by no other"),
    ({"parameters": RATES, "seed": 2}, "spec.seed", "needs strategy random or tpe"),
    ({"parameters": RATES, "strategy": "best"}, "spec.strategy", 'supported values: "grid", "random", "tpe"'),
    (
        {"parameters": [{"path": "lora.dropout", "min": 1}], "strategy": "random", "maxTrials": 2},
        "spec.parameters[0].min",
        "min and max belong together",
    ),
    (
        {"parameters": [{"path": "lora.dropout", "min": 1, "max": 0}], "strategy": "random", "maxTrials": 2},
        "spec.parameters[0].min",
        "must be less than max",
    ),
    (
        {"parameters": [{"path": "a.b", "min": 0, "max": 1, "scale": "log"}], "strategy": "random", "maxTrials": 2},
        "spec.parameters[0].scale",
        "log needs min and max above 0",
    ),
    ({"parameters": [{"path": "Lora rank", "values": [1]}]}, "spec.parameters[0].path", "must be a path"),
    ({"trials": [{"name": "a"}, {"name": "a"}]}, "spec.trials", ""),
    ({"parameters": RATES * 2}, "spec.parameters", ""),
    (
        {**NAMED, "template": TEMPLATE | {"pack": {"sweep": "nli", "trials": [{"name": "a"}] * 2}}},
        "spec.template.pack",
        "",
    ),
    ({"trials": [{"name": "A"}]}, "spec.trials[0].name", "must be lowercase letters"),
    ({**NAMED, "earlyStopping": {"rungs": [300]}}, "spec.earlyStopping.rungs", "must be multiples of"),
    ({**NAMED, "earlyStopping": {"rungs": [500, 250]}}, "spec.earlyStopping.rungs", "in ascending order"),
    ({**NAMED, "objective": {"metric": "f1"}}, "spec.objective.metric", "measured only when"),
    (
        {**NAMED, "earlyStopping": {"rungs": [250]}, "objective": {"metric": "trainLoss"}},
        "spec.earlyStopping",
        "must be evalLoss",
    ),
    ({**NAMED, "template": TEMPLATE | {"suspend": True}}, "spec.template.suspend", "suspend the sweep"),
    (
        {**NAMED, "template": TEMPLATE | {"ttlSecondsAfterFinished": 5}},
        "spec.template.ttlSecondsAfterFinished",
        "trials go with their sweep",
    ),
    ({**NAMED, "template": TEMPLATE | {"lora": {"rank": 0}}}, "spec.template.lora.rank", "greater than or equal to 1"),
    ({**NAMED, "parallelism": 1001}, "spec.parallelism", "less than or equal to 1000"),
    ({**NAMED, "packing": "always"}, "spec.packing", 'supported values: "auto", "enabled", "disabled"'),
    (
        {**NAMED, "template": TEMPLATE | {"pack": {"sweep": "nli", "trials": [{"name": "a"}]}}},
        "spec.template.pack",
        "a sweep packs its trials itself",
    ),
    ({**NAMED, "template": TEMPLATE | {"pack": {"sweep": "nli"}}}, "spec.template.pack.trials", "Required value"),
]


def made(name: str = "nli", **spec: Any) -> Object:
    template = copy.deepcopy({"template": TEMPLATE} | spec)
    kind = {"apiVersion": constants.API_VERSION, "kind": constants.SWEEP_KIND}
    return kind | {"metadata": {"name": name}, "spec": template}


@pytest.fixture(scope="module")
def server(either_cluster: Cluster) -> Iterator[Kube]:
    with either_cluster.namespace() as name:
        kube = Kube(either_cluster.access, name)
        yield kube
        kube.close()


@pytest.mark.parametrize("spec", ACCEPTED, ids=str)
def test_accepted(server: Kube, spec: dict[str, Any]):
    server.create(made(**spec), dryRun="All", fieldValidation="Strict")
    manifest.check_as(FineTuneSweep, manifest.Document(made(**spec), ""))


@pytest.mark.parametrize(("spec", "field", "says"), REFUSED, ids=[f"{field}-{says}" for _, field, says in REFUSED])
def test_refused_with_the_field_and_what_is_allowed(server: Kube, spec: dict[str, Any], field: str, says: str):
    with pytest.raises(ApiError) as refusal:
        server.create(made(**spec), dryRun="All", fieldValidation="Strict")
    assert field in refusal.value.message
    assert says in refusal.value.message
    with pytest.raises(manifest.ManifestError) as problem:
        manifest.check_as(FineTuneSweep, manifest.Document(made(**spec), ""))
    assert field in str(problem.value)
    assert says in str(problem.value)


def test_a_name_leaves_room_for_its_trials(server: Kube):
    with pytest.raises(ApiError, match="must be at most 40 lowercase letters"):
        server.create(made("a" * 41, **NAMED), dryRun="All")


def test_a_started_sweep_keeps_its_trials_and_takes_what_only_says_how_it_runs(server: Kube):
    server.create(made("started", parameters=[{"path": "lora.alpha", "values": [1, [2]]}]))
    server.patch(constants.SWEEP_KIND, "started", {"spec": {"parameters": RATES}})
    status = {"status": {"startTime": "2026-11-01T00:00:00Z"}}
    server.patch(constants.SWEEP_KIND, "started", status, subresource="status")
    changes = (
        {"parameters": [{"path": "training.learningRate", "values": [1e-4, 3e-4]}]},
        {"template": {"lora": {"rank": 4}}},
        {"objective": {"metric": "trainLoss"}},
        {"packing": "disabled"},
    )
    for change in changes:
        with pytest.raises(ApiError, match="cannot change once the sweep has started"):
            server.patch(constants.SWEEP_KIND, "started", {"spec": change})
    server.patch(constants.SWEEP_KIND, "started", {"spec": {"parallelism": 9, "suspend": True}})
