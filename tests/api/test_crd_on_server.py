"""The table of manifests and what the CRD promises beside it, tried on the real API server and on the stand-in.

The real kube-apiserver evaluates the CRD itself (structural schema and CEL); the stand-in evaluates the schema and asks
the models for the rest. Both have to answer alike, and like the models (test_manifests.py).
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from api.manifests import ACCEPTED, MINIMAL, REFUSED, Case
from finetune_api import constants
from finetune_api.manifest import Document, check
from finetune_api.spec import IMMUTABLE
from support.server.client import ApiError, Kube, Object
from support.server.server import Cluster


@pytest.fixture(scope="module")
def server(either_cluster: Cluster) -> Iterator[Kube]:
    """A client for a namespace that all refusals share, with one job in it that none of them may change."""
    with either_cluster.namespace() as name:
        kube = Kube(either_cluster.access, name)
        kube.create(_within(name, MINIMAL))
        yield kube
        kube.close()


def _within(namespace: str | None, manifest: Object) -> Object:
    return manifest | {"metadata": manifest["metadata"] | {"namespace": namespace}}


def _refusal(kube: Kube, manifest: Object) -> ApiError:
    with pytest.raises(ApiError) as refusal:
        kube.create(_within(kube.namespace, manifest), dryRun="All", fieldValidation="Strict")
    return refusal.value


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.id)
def test_accepted_and_unchanged(server: Kube, case: Case):
    manifest = _within(server.namespace, case.manifest())
    if "metadata.name" not in case.changes:
        manifest["metadata"]["name"] = "another"
    stored = server.create(manifest, dryRun="All", fieldValidation="Strict")
    assert _is_within(manifest["spec"], stored["spec"]), stored["spec"]


def _is_within(small: Any, large: Any) -> bool:
    """Whether `large` holds all that `small` does (defaults may be added, and null is nothing)."""
    if isinstance(small, dict):
        given = {key: value for key, value in small.items() if value is not None}
        return isinstance(large, dict) and all(key in large and _is_within(given[key], large[key]) for key in given)
    if isinstance(small, list):
        return isinstance(large, list) and len(small) == len(large) and all(map(_is_within, small, large))
    return small == large


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_refused_with_the_field_and_what_is_allowed(server: Kube, case: Case):
    error = _refusal(server, case.manifest())
    assert error.code in (400, 422)
    assert case.field
    assert case.field in error.message
    assert (case.server_says or case.says) in error.message
    assert "match '" not in error.message, "a sentence, not a regular expression"


@pytest.mark.parametrize(
    "case", [case for case in REFUSED if "metadata.name" not in case.changes], ids=lambda case: case.id
)
def test_a_refused_change_leaves_the_object_as_it_was(server: Kube, case: Case):
    before = server.get(constants.KIND, "nli")
    with pytest.raises(ApiError):
        server.replace(case.manifest() | {"metadata": before["metadata"]}, fieldValidation="Strict")
    assert server.get(constants.KIND, "nli") == before


def test_defaults_are_the_models_defaults(either: Kube):
    manifest = _within(either.namespace, MINIMAL)
    stored = either.create(manifest)
    assert stored["spec"] == check(Document(manifest, "job.yaml")).spec.manifest()


def test_every_refusal_lists_its_fields_as_causes(server: Kube):
    manifest = copy.deepcopy(MINIMAL)
    manifest["spec"] |= {"lora": {"rank": -1, "bias": "some"}, "training": {"epochs": 0}}
    error = _refusal(server, manifest)
    assert error.reason == "Invalid"
    fields = {cause["field"] for cause in error.causes}
    assert {"spec.lora.rank", "spec.lora.bias", "spec.training.epochs"} <= fields


_CHANGES: dict[str, Any] = {
    "model": {"source": "hf://other/model"},
    "dataset": {"train": "s3://data/other.jsonl"},
    "quantization": {"bits": 8},
    "lora": {"rank": 8},
    "training": {"epochs": 1},
    "evaluation": {"everySteps": 7},
    "checkpoint": {"everySteps": 7},
    "logging": {"everySteps": 7},
    "resources": {"sharedMemory": "1Gi"},
    "cache": {"claimName": "cache"},
    "output": {"uri": "s3://adapters/other"},
    "publish": {"onlyIf": [{"metric": "evalLoss", "atMost": 1}]},
    "pack": {"sweep": "nli", "trials": [{"name": "a"}]},
    "image": "example.org/other:1",
    "pendingDeadlineSeconds": 60,
}


def _job(kube: Kube, *, started: bool, **status: Any) -> Object:
    manifest = copy.deepcopy(MINIMAL)
    manifest["spec"]["dataset"]["evalFraction"] = 0.1  # publish needs held-out rows
    stored = kube.create(_within(kube.namespace, manifest))
    if started:
        status = {"attempts": [{"jobName": "nli-1"}]} | status
        stored = kube.patch(constants.KIND, "nli", {"status": status}, subresource="status")
    return stored


@pytest.mark.parametrize("section", IMMUTABLE)
def test_a_section_may_change_until_an_attempt_exists(either: Kube, section: str):
    _job(either, started=False)
    changed = either.patch(constants.KIND, "nli", {"spec": {section: _CHANGES[section]}})
    assert _is_within(_CHANGES[section], changed["spec"][section])
    assert changed["metadata"]["generation"] == 2


@pytest.mark.parametrize("section", [section for section in IMMUTABLE if section != "image"])
def test_a_section_may_not_change_once_an_attempt_exists(either: Kube, section: str):
    _job(either, started=True)
    with pytest.raises(ApiError) as refusal:
        either.patch(constants.KIND, "nli", {"spec": {section: _CHANGES[section]}})
    assert refusal.value.code == 422
    sentence = "cannot change once an attempt exists: delete the job and create it again"
    assert section in refusal.value.message
    assert sentence in refusal.value.message


def _attempts(*fields: dict[str, Any]) -> dict[str, Any]:
    return {"attempts": [{"jobName": f"nli-{number}"} | each for number, each in enumerate(fields, 1)]}


@pytest.mark.parametrize(
    "status",
    [
        _attempts({}),
        _attempts({"reason": "SpecChanged", "runSeconds": 0}, {"message": "ImagePullBackOff"}),
        _attempts(*[{"reason": "Preempted", "runSeconds": 0}] * 111),
    ],
    ids=["waits", "changed before", "many"],
)
@pytest.mark.parametrize("image", ["example.org/other:1", None], ids=["another", "the default"])
def test_the_image_may_be_mended_until_a_pod_has_run(either: Kube, status: dict[str, Any], image: str | None):
    _job(either, started=True, **status)
    either.patch(constants.KIND, "nli", {"spec": {"image": "example.org/tpyo:1"}})
    changed = either.patch(constants.KIND, "nli", {"spec": {"image": image}})
    assert changed["spec"].get("image") == image
    with pytest.raises(ApiError, match=r"spec\.model.* cannot change once an attempt exists"):
        either.patch(constants.KIND, "nli", {"spec": {"image": image, "model": _CHANGES["model"]}})


@pytest.mark.parametrize(
    "status",
    [
        _attempts({"runSeconds": 0}),
        _attempts({"reason": "TrainerCrashed", "runSeconds": 3}, {}),
        _attempts({}) | {"completionTime": "2026-01-01T00:00:00Z"},
    ],
    ids=["runs", "ran", "over"],
)
@pytest.mark.parametrize("image", ["example.org/other:1", None], ids=["another", "the default"])
def test_the_image_may_not_change_once_a_pod_has_run(either: Kube, status: dict[str, Any], image: str | None):
    _job(either, started=False)
    either.patch(constants.KIND, "nli", {"spec": {"image": "example.org/trainer:1"}})
    either.patch(constants.KIND, "nli", {"status": status}, subresource="status")
    with pytest.raises(ApiError) as refusal:
        either.patch(constants.KIND, "nli", {"spec": {"image": image}})
    assert refusal.value.code == 422
    assert "spec.image" in refusal.value.message
    assert "cannot change once the job has run or ended: delete the job and create it again" in refusal.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suspend", True),
        ("ttlSecondsAfterFinished", 60),
        ("activeDeadlineSeconds", 60),
        ("recovery", {"maxAttempts": 1}),
    ],
)
def test_what_may_change_at_any_time(either: Kube, field: str, value: Any):
    _job(either, started=True)
    changed = either.patch(constants.KIND, "nli", {"spec": {field: value}})
    assert _is_within(value, changed["spec"][field])


def test_status_and_spec_never_change_each_other(either: Kube):
    _job(either, started=False)
    by_status = either.patch(
        constants.KIND, "nli", {"spec": {"suspend": True}, "status": {"phase": "Training"}}, subresource="status"
    )
    assert (by_status["spec"]["suspend"], by_status["status"]["phase"]) == (False, "Training")
    assert by_status["metadata"]["generation"] == 1
    by_spec = either.patch(constants.KIND, "nli", {"spec": {"suspend": True}, "status": {"phase": "Failed"}})
    assert (by_spec["spec"]["suspend"], by_spec["status"]["phase"]) == (True, "Training")
    assert by_spec["metadata"]["generation"] == 2


def test_a_wrong_status_is_refused(either: Kube):
    _job(either, started=False)
    condition = {"type": "Accepted", "status": "Perhaps", "reason": "X", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    with pytest.raises(ApiError) as refusal:
        either.patch(constants.KIND, "nli", {"status": {"conditions": [condition]}}, subresource="status")
    assert "status.conditions[0].status" in refusal.value.message
