"""The administrator's rules, each with specs it refuses, by its name, and specs it lets through."""

from typing import Any

import pytest

from finetune_operator.core import policy
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.settings import Settings

Object = dict[str, Any]
COMMIT = "a" * 40
TEAM_ONLY = {"allowed_images": ("registry.example.com/team/*",)}
S3_ONLY = {"allowed_s3_buckets": ("team-*",)}
REMOTE = {"model": {"source": "hf://example/model", "revision": COMMIT, "trustRemoteCode": True}}
EIGHT_GPUS = {"resources": {"nodes": 2, "gpusPerNode": 4}}


def said(spec: Object, settings: Object, namespace: str = "research") -> str:
    """The refusal's sentence; empty when the job may run."""
    base: Object = {
        "model": {"source": "hf://example/model"},
        "dataset": {"train": "s3://team-data/train.jsonl"},
        "output": {"uri": "s3://team-adapters/nli"},
    }
    job = JobObject.from_api({"metadata": {"name": "nli", "namespace": namespace}, "spec": {**base, **spec}})
    read = policy.read_spec(job)
    assert not isinstance(read, policy.Rejection), read
    found = policy.check_policy(job, read, Settings.model_construct(**settings))
    assert found is None or found.reason == policy.REFUSED
    return found.message if found else ""


#: rule -> (spec, settings) that it refuses
REFUSED: list[tuple[str, Object, Object]] = [
    ("allowed_images", {"image": "registry.example.com/team/trainer:1"}, {}),
    ("allowed_images", {"image": "registry.example.com/other/trainer:1"}, TEAM_ONLY),
    ("max_gpus_per_job", EIGHT_GPUS, {"max_gpus_per_job": 7}),
    ("max_gpus_per_job", EIGHT_GPUS, {"max_gpus_per_job": 99, "max_gpus_per_job_by_namespace": {"research": 4}}),
    ("allowed_s3_buckets", {"output": {"uri": "s3://others/nli"}}, S3_ONLY),
    ("allowed_s3_buckets", {"lora": {"initFrom": "s3://others/nli"}}, S3_ONLY),
    ("allow_remote_code", REMOTE, {}),
    ("allow_file_output", {"output": {"uri": "file:///adapters"}}, {}),
    ("allow_file_output", {"checkpoint": {"uri": "file:///adapters"}}, {}),
    ("protected_paths", {"dataset": {"train": "file:///proc/self/environ"}}, {}),
    ("protected_paths", {"dataset": {"train": "s3://team-data/a.jsonl", "eval": "file:///run/secrets/a"}}, {}),
    ("protected_paths", {"model": {"source": "file:///var/run/secrets/finetune/output"}}, {}),
    ("protected_paths", {"lora": {"initFrom": "file:///sys"}}, {}),
    ("protected_paths", {"output": {"uri": "file:///dev/shm/"}}, {"allow_file_output": True}),
]

ACCEPTED: list[tuple[Object, Object]] = [
    ({}, {}),
    ({"image": "registry.example.com/team/trainer:1"}, TEAM_ONLY),
    ({"image": Settings.model_construct().trainer_image}, {}),
    ({"image": "registry.example.com/own:2"}, {"trainer_image": "registry.example.com/own:2", **TEAM_ONLY}),
    (EIGHT_GPUS, {"max_gpus_per_job": 8}),
    (EIGHT_GPUS, {"max_gpus_per_job": 0, "max_gpus_per_job_by_namespace": {"research": 8}}),
    ({"model": {"source": "pvc://models/mistral"}}, S3_ONLY),
    (REMOTE, {"allow_remote_code": True}),
    ({"output": {"uri": "file:///adapters"}}, {"allow_file_output": True}),
    ({"model": {"source": "file:///models/mistral"}, "dataset": {"train": "file:///procedures/dev/a.jsonl"}}, {}),
]


@pytest.mark.parametrize(("rule", "spec", "settings"), REFUSED)
def test_a_rule_refuses_by_its_name_and_by_the_field(rule: str, spec: Object, settings: Object) -> None:
    message = said(spec, settings)
    assert message.startswith("spec.")
    assert message.endswith(f"(administrator's rule {rule})")


@pytest.mark.parametrize(("spec", "settings"), ACCEPTED)
def test_what_no_rule_forbids_may_run(spec: Object, settings: Object) -> None:
    assert said(spec, settings) == ""


def test_every_rule_is_tried() -> None:
    assert {rule for rule, _, _ in REFUSED} == {rule.__name__.removeprefix("_") for rule in policy._RULES}


def test_the_sentence_says_what_is_allowed() -> None:
    image = {"image": "docker.io/evil:1"}
    assert "allowed: own:1 (" in said(image, {"trainer_image": "own:1"})
    assert "allowed: own:1, registry.example.com/team/* (" in said(image, {"trainer_image": "own:1", **TEAM_ONLY})
    assert "a job in namespace research may have 7" in said(EIGHT_GPUS, {"max_gpus_per_job": 7})
    assert "bucket others is not allowed; allowed: team-*" in said({"output": {"uri": "s3://others/a"}}, S3_ONLY)
