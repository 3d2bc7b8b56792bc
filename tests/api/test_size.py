"""How large a job may be: every field has a bound, and the largest job is one that the API server takes."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api.crd import crd
from finetune_api.manifest import Document, check
from finetune_operator.core.policy import MAX_SPEC_BYTES
from support.common.largest import largest_job
from support.server.client import Kube

SPEC = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]


def unbounded(schema: dict[str, Any], path: str) -> Iterator[str]:
    """The fields that may grow without end."""
    bounds = {"string": "maxLength", "array": "maxItems", "object": "maxProperties"}
    kind = schema.get("type", "string" if schema.get("x-kubernetes-int-or-string") else "")
    is_free = kind != "object" or "properties" not in schema
    words = any("self in [" in rule["rule"] for rule in schema.get("x-kubernetes-validations", ()))
    if is_free and kind in bounds and bounds[kind] not in schema and "enum" not in schema and not words:
        yield f"{path} ({kind})"
    if schema.get("x-kubernetes-preserve-unknown-fields") or not kind:
        yield f"{path} (anything)"
    if schema.get("additionalProperties") and not any(
        "self.all(" in rule["rule"] for rule in schema.get("x-kubernetes-validations", ())
    ):
        yield f"{path} (keys)"
    for name, child in schema.get("properties", {}).items():
        yield from unbounded(child, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from unbounded(schema[name], f"{path}[]")


def test_no_field_of_the_spec_may_grow_without_end():
    assert list(unbounded(SPEC, "spec")) == []


def test_the_largest_job_is_valid_and_smaller_than_what_the_operator_refuses_unseen():
    spec = check(Document(largest_job("nli"), "")).spec
    size = len(spec.model_dump_json(by_alias=True, exclude_none=True).encode())
    assert 0.85 * MAX_SPEC_BYTES < size < 0.97 * MAX_SPEC_BYTES


def test_the_api_server_takes_the_largest_job(either: Kube):
    stored = either.create(largest_job("nli"), fieldValidation="Strict")
    assert len(json.dumps(stored["spec"], ensure_ascii=False).encode()) > 0.85 * MAX_SPEC_BYTES


@pytest.mark.parametrize("field", ["nodeSelector", "affinity"])
def test_a_little_more_than_the_largest_is_refused(either: Kube, field: str):
    job = largest_job("nli")
    resources = job["spec"]["resources"]
    if field == "nodeSelector":
        resources[field]["one-more"] = ""
    else:
        resources[field]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][1]["namespaces"] = ["more"]
    with pytest.raises(Exception, match=field):
        either.create(job)
