"""The administrator's rules, each with specs it refuses, by its name, and specs it lets through."""

from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api.crd import crd
from finetune_operator.core import policy
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.settings import Settings

Object = dict[str, Any]
COMMIT = "a" * 40
BASE: Object = {
    "model": {"source": "hf://example/model"},
    "dataset": {"train": "s3://team-data/train.jsonl"},
    "output": {"uri": "s3://team-adapters/nli"},
}
TEAM_ONLY = {"allowed_images": ("registry.example.com/team/*",)}
S3_ONLY = {"allowed_s3_buckets": ("team-*",)}
REMOTE = {"model": {"source": "hf://example/model", "revision": COMMIT, "trustRemoteCode": True}}
EIGHT_GPUS = {"resources": {"nodes": 2, "gpusPerNode": 4}}
NVIDIA, GPU, SPOT = ("nvidia.com/*",), ("nvidia.com/gpu",), {"key": "spot", "operator": "Exists"}
POOL = {"node_selector": {"pool": "gpu"}}


def resources(**values: Any) -> Object:
    return {"resources": values}


def tolerates(**toleration: str) -> Object:
    return resources(tolerations=[toleration])


def said(spec: Object, settings: Object, namespace: str = "research") -> str:
    """The refusal's sentence; empty when the job may run."""
    job = JobObject.from_api({"metadata": {"name": "nli", "namespace": namespace}, "spec": {**BASE, **spec}})
    read = policy.read_spec(job)
    assert not isinstance(read, policy.Rejection), read
    found = policy.check_policy(job, read, Settings.model_construct(**settings))
    assert found is None or found.reason == policy.REFUSED
    return found.message if found else ""


#: rule -> (spec, settings) that it refuses
REFUSED: list[tuple[str, Object, Object]] = [
    ("policy.allowedImages", {"image": "registry.example.com/team/trainer:1"}, {}),
    ("policy.allowedImages", {"image": "registry.example.com/other/trainer:1"}, TEAM_ONLY),
    ("policy.maxGpusPerJob", EIGHT_GPUS, {"max_gpus_per_job": 7}),
    (
        "policy.maxGpusPerJob",
        EIGHT_GPUS,
        {"max_gpus_per_job": 99, "max_gpus_per_job_by_namespace": {"research": 4}},
    ),
    ("policy.allowedGpuResources", resources(gpuResource="example.com/fpga"), {"allowed_gpu_resources": NVIDIA}),
    ("policy.maxSharedMemory", resources(sharedMemory="65Gi"), {}),
    ("policy.maxSharedMemory", resources(sharedMemory=2**40), {"max_shared_memory": "1T"}),
    ("policy.allowedPriorityClasses", resources(priorityClassName="system-node-critical"), {}),
    ("policy.allowedPriorityClasses", resources(priorityClassName="high"), {"allowed_priority_classes": ("low*",)}),
    ("policy.allowedRuntimeClasses", resources(runtimeClassName="host"), {"allowed_runtime_classes": ("nvidia",)}),
    ("policy.allowedTolerations", tolerates(key="node-role.kubernetes.io/control-plane"), {"allowed_tolerations": GPU}),
    ("policy.allowedTolerations", tolerates(operator="Exists"), {"allowed_tolerations": GPU}),
    ("policy.allowedTolerations", tolerates(key="spot"), {"allowed_tolerations": GPU, "tolerations": (SPOT,)}),
    ("trainer.nodeSelector", resources(nodeSelector={"zone": "a", "pool": "system"}), POOL),
    ("policy.allowedS3Buckets", {"output": {"uri": "s3://others/nli"}}, S3_ONLY),
    ("policy.allowedS3Buckets", {"lora": {"initFrom": "s3://others/nli"}}, S3_ONLY),
    ("policy.allowRemoteCode", REMOTE, {}),
    ("file output", {"output": {"uri": "file:///adapters"}}, {}),
    ("file output", {"checkpoint": {"uri": "file:///adapters"}}, {}),
    ("protected paths", {"dataset": {"train": "file:///proc/self/environ"}}, {}),
    ("protected paths", {"dataset": {"train": "s3://team-data/a.jsonl", "eval": "file:///run/secrets/a"}}, {}),
    ("protected paths", {"model": {"source": "file:///var/run/secrets/finetune/output"}}, {}),
    ("protected paths", {"lora": {"initFrom": "file:///sys"}}, {}),
    ("protected paths", {"output": {"uri": "file:///dev/shm/"}}, {"allow_file_output": True}),
]

ACCEPTED: list[tuple[Object, Object]] = [
    ({}, {}),
    ({"image": "registry.example.com/team/trainer:1"}, TEAM_ONLY),
    ({"image": Settings.model_construct().trainer_image}, {}),
    ({"image": "registry.example.com/own:2"}, {"trainer_image": "registry.example.com/own:2", **TEAM_ONLY}),
    (EIGHT_GPUS, {"max_gpus_per_job": 8}),
    (EIGHT_GPUS, {"max_gpus_per_job": 0, "max_gpus_per_job_by_namespace": {"research": 8}}),
    (resources(gpuResource="nvidia.com/mig-1g.10gb"), {"allowed_gpu_resources": NVIDIA}),
    (resources(gpusPerNode=0, gpuResource="example.com/fpga"), {"allowed_gpu_resources": NVIDIA}),
    (resources(sharedMemory="64Gi"), {}),
    (resources(sharedMemory="8000Gi"), {"max_shared_memory": None}),
    (resources(priorityClassName="high"), {}),
    (resources(priorityClassName="system-node-critical"), {"allowed_priority_classes": ("system-*",)}),
    (resources(runtimeClassName="nvidia"), {"allowed_runtime_classes": ("nvidia",)}),
    (tolerates(key="nvidia.com/gpu"), {"allowed_tolerations": GPU}),
    (tolerates(operator="Exists"), {"allowed_tolerations": ("*",)}),
    (tolerates(**SPOT), {"allowed_tolerations": GPU, "tolerations": (SPOT,)}),
    (resources(nodeSelector={"zone": "a", "pool": "gpu"}), POOL),
    ({"model": {"source": "pvc://models/mistral"}}, S3_ONLY),
    (REMOTE, {"allow_remote_code": True}),
    ({"output": {"uri": "file:///adapters"}}, {"allow_file_output": True}),
    ({"model": {"source": "file:///models/mistral"}, "dataset": {"train": "file:///procedures/dev/a.jsonl"}}, {}),
]


@pytest.mark.parametrize(("rule", "spec", "settings"), REFUSED)
def test_a_rule_refuses_by_its_name_and_by_the_field(rule: str, spec: Object, settings: Object) -> None:
    message = said(spec, settings)
    assert message.startswith("spec.")
    assert (
        "allowed" in message
        or "may have" in message
        or "protected" in message
        or "use s3" in message
        or "take" in message
    )
    assert message.endswith(f"(administrator's rule {rule})")


@pytest.mark.parametrize(("spec", "settings"), ACCEPTED)
def test_what_no_rule_forbids_may_run(spec: Object, settings: Object) -> None:
    assert said(spec, settings) == ""


def test_every_rule_is_tried() -> None:
    assert {rule for rule, _, _ in REFUSED} == policy.RULES.keys()


def test_the_sentence_says_what_is_allowed() -> None:
    image = {"image": "docker.io/evil:1"}
    assert "allowed: own:1 (" in said(image, {"trainer_image": "own:1"})
    assert "allowed: own:1, registry.example.com/team/* (" in said(image, {"trainer_image": "own:1", **TEAM_ONLY})
    assert "a job in namespace research may have 7" in said(EIGHT_GPUS, {"max_gpus_per_job": 7})
    assert "bucket others is not allowed; allowed: team-*" in said({"output": {"uri": "s3://others/a"}}, S3_ONLY)


def test_a_long_list_of_what_is_allowed_does_not_push_the_rules_name_out() -> None:
    buckets = {"allowed_s3_buckets": tuple(f"team-{number}-bucket" for number in range(1000))}
    message = said({"output": {"uri": "s3://others/nli"}}, buckets)
    assert len(message) < 1000
    assert message.endswith("… (administrator's rule policy.allowedS3Buckets)")


def uri_fields(node: Object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field of the schema that takes a URI; "[]" stands for an item of a list."""
    if any("s3://bucket/key" in rule["message"] for rule in node.get("x-kubernetes-validations", [])):
        yield path
    for name, child in node.get("properties", {}).items():
        yield from uri_fields(child, (*path, name))
    if "items" in node:
        yield from uri_fields(node["items"], (*path, "[]"))


SPEC_SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]


@pytest.mark.parametrize("path", list(uri_fields(SPEC_SCHEMA)), ids=".".join)
def test_no_field_that_takes_a_uri_is_overlooked(path: tuple[str, ...]) -> None:
    value: Any = "s3://others/x"
    for part in reversed(path[1:]):
        value = [value | ({"metric": "evalLoss"} if path[0] == "publish" else {})] if part == "[]" else {part: value}
    section = value if path[0] == "dataset" and "sources" in value else {**BASE.get(path[0], {}), **value}
    held_out = {"dataset": {**BASE["dataset"], "evalFraction": 0.1}}
    assert said({**held_out, path[0]: section}, S3_ONLY).endswith("(administrator's rule policy.allowedS3Buckets)")
