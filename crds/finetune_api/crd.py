"""The CustomResourceDefinition, generated from the models: structural schema, defaults, CEL rules, printer columns.

`python -m finetune_api.crd` prints it; `make crds` writes it to crds/finetunejobs.yaml.
Schema rules: https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetune_api import constants
from finetune_api.base import ApiModel
from finetune_api.patterns import JOB_NAME
from finetune_api.spec import IMMUTABLE, FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

Schema = dict[str, Any]
#: Name, type, JSONPath, description, priority.
Column = tuple[str, str, str, str, int]

_HEADER = "# Generated from finetune_api by `make crds`. Edit the models, not this file.\n"
_DROPPED = {"title", "default", "additionalProperties", "const", "exclusiveMinimum", "exclusiveMaximum", "$defs"}
_COLUMNS = (
    ("Phase", "string", ".status.phase", "Where the job stands", 0),
    ("Step", "string", ".status.progress.summary", "Optimizer steps done / in all", 0),
    ("Loss", "number", ".status.progress.loss", "Latest training loss", 0),
    ("ETA", "string", ".status.progress.estimatedCompletionTime", "When the last step should be done", 0),
    ("Adapter", "string", ".status.adapter.uri", "Where the published adapter lies", 0),
    ("Age", "date", ".metadata.creationTimestamp", "Since creation", 0),
    ("Reason", "string", '.status.conditions[?(@.type=="Succeeded")].reason', "Why it stands there", 1),
)


def structural(schema: Schema, definitions: Schema) -> Schema:
    """Return a pydantic JSON schema node (draft 2020-12) as a Kubernetes structural schema (OpenAPI v3.0)."""
    if "$ref" in schema:
        target = definitions[schema["$ref"].rsplit("/", 1)[1]]
        return structural(target, definitions) | (
            {"description": schema["description"]} if "description" in schema else {}
        )
    branches = [branch for branch in schema.get("anyOf", []) if branch.get("type") != "null"]
    extensions = {key: value for key, value in schema.items() if key.startswith("x-kubernetes-")}
    if "x-kubernetes-int-or-string" in extensions:
        return {key: schema[key] for key in ("description", "maxLength") if key in schema} | extensions
    if branches:
        merged = {key: value for key, value in schema.items() if key != "anyOf"}
        return structural(branches[0] | merged, definitions)
    node = {key: value for key, value in schema.items() if key not in _DROPPED}
    if "exclusiveMinimum" in schema:
        node |= {"minimum": schema["exclusiveMinimum"], "exclusiveMinimum": True}
    if "exclusiveMaximum" in schema:
        node |= {"maximum": schema["exclusiveMaximum"], "exclusiveMaximum": True}
    if "const" in schema:
        node["enum"] = [schema["const"]]
    if "properties" in schema:
        node["properties"] = {name: structural(child, definitions) for name, child in schema["properties"].items()}
    if "items" in schema:
        node["items"] = structural(schema["items"], definitions)
    if isinstance(schema.get("additionalProperties"), dict):
        node["additionalProperties"] = structural(schema["additionalProperties"], definitions)
    return node


def _with_rules_and_defaults(schema: Schema, model: type[ApiModel]) -> Schema:
    """Add what JSON Schema cannot carry: the model's CEL rules, and defaults (an empty object for a nested model)."""
    if model.RULES:
        schema["x-kubernetes-validations"] = [rule.schema() for rule in model.RULES]
    for field in model.model_fields.values():
        node = schema["properties"][field.alias]
        nested = model_of(field)
        if nested is not None:
            _with_rules_and_defaults(node.get("items", node), nested)
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        if isinstance(default, BaseModel):
            node["default"] = {}
        elif default is not None:
            node["default"] = default
    return schema


def model_of(field: FieldInfo) -> type[ApiModel] | None:
    """Return the API model that a field holds (directly, optionally, or in a list), if any."""
    candidates: list[Any] = [field.annotation]
    while candidates:
        candidate = candidates.pop()
        if isinstance(candidate, type) and issubclass(candidate, ApiModel):
            return candidate
        candidates.extend(getattr(candidate, "__args__", ()))
    return None


def model_schema(model: type[ApiModel]) -> Schema:
    """Return the structural schema of one model."""
    raw = model.model_json_schema(by_alias=True, mode="validation")
    return _with_rules_and_defaults(structural(raw, raw.get("$defs", {})), model)


def _immutability() -> list[dict[str, str]]:
    """One transition rule per section, so that the refusal names it.

    It applies once an attempt exists; to the image once a pod has run, for a wrong one keeps every pod from that.
    """
    attempts = "has(oldSelf.status) && has(oldSelf.status.attempts)"
    exists = f"{attempts} && size(oldSelf.status.attempts) > 0"
    ran = "has(a.runSeconds) && (a.runSeconds > 0 || !has(a.reason))"
    over = "has(oldSelf.status) && has(oldSelf.status.completionTime)"
    has_run = f"{over} || {attempts} && oldSelf.status.attempts.exists(a, {ran})"
    optional = {
        field.alias
        for field in FineTuneJobSpec.model_fields.values()
        if not field.is_required() and field.default is None
    }
    rules = []
    for section in IMMUTABLE:
        new, old = f"self.spec.{section}", f"oldSelf.spec.{section}"
        same = f"{new} == {old}"
        if section in optional:
            same = f"has({new}) == has({old}) && (!has({new}) || {same})"
        frozen, since = (has_run, "the job has run or ended") if section == "image" else (exists, "an attempt exists")
        rules.append(
            {
                "rule": f"!({frozen}) || ({same})",
                "message": f"cannot change once {since}: delete the job and create it again",
                "fieldPath": f".spec.{section}",
                "reason": "FieldValueForbidden",
            }
        )
    return rules


def _root_rules() -> list[dict[str, Any]]:
    # The server takes no fieldPath into metadata, so the sentence names the field.
    # Only at creation, for a name cannot change: an older object must take the status that refuses it.
    name = {
        "rule": f"oldSelf.hasValue() || {JOB_NAME.cel_of('self.metadata.name')}",
        "optionalOldSelf": True,
        "message": f"metadata.name {JOB_NAME.message}",
    }
    return [name, *_immutability()]


def definition(
    kind: str, plural: str, short: str, columns: Sequence[Column], schema: Schema, rules: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the CustomResourceDefinition of one kind as plain data.

    Args:
        kind: The kind.
        plural: Its plural.
        short: Its short name.
        columns: The printer columns.
        schema: description, and the schemas of spec and status.
        rules: CEL rules over the whole object.
    """
    root = {
        "type": "object",
        "description": schema["description"],
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": schema["spec"],
            "status": schema["status"],
        },
        "x-kubernetes-validations": rules,
    }
    version = {
        "name": constants.VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": root},
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": name, "type": type_, "jsonPath": path, "description": description}
            | ({"priority": priority} if priority else {})
            for name, type_, path, description, priority in columns
        ],
    }
    names = {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{constants.GROUP}"},
        "spec": {
            "group": constants.GROUP,
            "scope": "Namespaced",
            "names": {**names, "shortNames": [short], "categories": ["all"]},
            "versions": [version],
        },
    }


def crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition of FineTuneJobs as plain data."""
    schema = {
        "description": "One fine-tuning run: a base model and a data set in, a verified LoRA adapter out.",
        "spec": model_schema(FineTuneJobSpec),
        "status": model_schema(FineTuneJobStatus),
    }
    return definition(constants.KIND, constants.PLURAL, constants.SHORT_NAME, _COLUMNS, schema, _root_rules())


def render(definition: dict[str, Any]) -> str:
    """Return a definition as YAML text."""
    plain = json.loads(json.dumps(definition))  # shared nodes would come out as YAML anchors
    return _HEADER + yaml.safe_dump(plain, sort_keys=False, width=120)


if __name__ == "__main__":
    sys.stdout.write(render(crd()))
