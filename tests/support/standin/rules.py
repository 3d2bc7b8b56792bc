"""What the stand-in fills in and refuses, object by object. Pure."""

import base64
import copy
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

from finetune_api import constants, manifest
from finetune_api.spec import IMMUTABLE, FineTuneJob
from finetune_api.sweep import FROZEN, FineTuneSweep
from support.standin import schema as standin_schema
from support.standin.schema import Cause
from support.standin.store import Refusal
from support.standin.types import Resource

Object = dict[str, Any]

_DNS_NAME = re.compile(r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")
_MODELS: dict[str, Any] = {constants.KIND: FineTuneJob, constants.SWEEP_KIND: FineTuneSweep}
_COLON_NAMES = ("roles", "rolebindings", "clusterroles", "clusterrolebindings")
_JOB_DEFAULTS = {
    "backoffLimit": 6,
    "completionMode": "NonIndexed",
    "completions": 1,
    "parallelism": 1,
    "suspend": False,
    "podReplacementPolicy": "TerminatingOrFailed",
}
_POD_DEFAULTS = {
    "restartPolicy": "Always",
    "terminationGracePeriodSeconds": 30,
    "dnsPolicy": "ClusterFirst",
    "schedulerName": "default-scheduler",
}
_CONTAINER_DEFAULTS = {
    "terminationMessagePath": "/dev/termination-log",
    "terminationMessagePolicy": "File",
    "imagePullPolicy": "IfNotPresent",
}


def random_suffix() -> str:
    return "".join(random.choices("bcdfghjklmnpqrstvwxz2456789", k=5))


def invalid(resource: Resource, name: str, causes: Iterable[Cause]) -> Refusal:
    """A 422 that names every refused field, worded as the API server words it."""
    listed = list(causes)
    title = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    sentences = [str(cause) for cause in listed]
    text = sentences[0] if len(sentences) == 1 else "[" + ", ".join(sentences) + "]"
    entries = [{"reason": c.reason, "message": c.message, "field": c.field} for c in listed]
    details = {"name": name, "group": resource.group, "kind": resource.kind, "causes": entries}
    return Refusal(422, "Invalid", f'{title} "{name}" is invalid: {text}', details)


def normalized(resource: Resource, obj: Object, strict: bool) -> Object:
    """The object as it is stored: names made, unknown fields pruned (or refused when `strict`), defaults filled in."""
    new = copy.deepcopy(obj)
    new["apiVersion"], new["kind"] = resource.group_version, resource.kind
    metadata = new.setdefault("metadata", {})
    if not metadata.get("name") and metadata.get("generateName"):
        metadata["name"] = metadata["generateName"] + random_suffix()
    metadata.pop("managedFields", None)
    if resource.schema is not None:
        return _normalized_custom(resource, new, strict)
    return _BUILTIN_DEFAULTS.get(resource.kind, lambda unchanged: unchanged)(new)


def _normalized_custom(resource: Resource, obj: Object, strict: bool) -> Object:
    schema = resource.schema or {}
    unknown: list[str] = []
    for part in set(obj) - {"apiVersion", "kind", "metadata"}:
        sub = (schema.get("properties") or {}).get(part)
        if sub is None and schema.get("x-kubernetes-preserve-unknown-fields"):
            continue
        if sub is None:
            unknown.append(part)
            del obj[part]
            continue
        if obj[part] is None:  # as if it were not there
            del obj[part]
            continue
        obj[part], more = standin_schema.pruned(obj[part], sub, part)
        unknown += more
        obj[part] = standin_schema.with_defaults(obj[part], sub)
    if unknown and strict:
        listed = ", ".join(f'unknown field "{name}"' for name in sorted(unknown))
        text = f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}: '
        raise Refusal(400, "BadRequest", f"{text}strict decoding error: {listed}")
    return obj


def _job(obj: Object) -> Object:
    spec = obj.setdefault("spec", {})
    for key, value in _JOB_DEFAULTS.items():
        spec.setdefault(key, value)
    if "podFailurePolicy" in spec:
        spec["podReplacementPolicy"] = "Failed"
    _pod_spec(spec["template"].setdefault("spec", {}))
    return obj


def _pod(obj: Object) -> Object:
    obj.setdefault("status", {}).setdefault("phase", "Pending")
    _pod_spec(obj.setdefault("spec", {}))
    return obj


def _pod_spec(spec: Object) -> None:
    for key, value in _POD_DEFAULTS.items():
        spec.setdefault(key, value)
    for container in spec.get("containers", []):
        for key, value in _CONTAINER_DEFAULTS.items():
            container.setdefault(key, value)


def _namespace(obj: Object) -> Object:
    obj.setdefault("status", {}).setdefault("phase", "Active")
    obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = obj["metadata"].get("name")
    return obj


def _secret(obj: Object) -> Object:
    for key, value in (obj.pop("stringData", None) or {}).items():
        obj.setdefault("data", {})[key] = base64.b64encode(value.encode()).decode()
    obj.setdefault("type", "Opaque")
    return obj


_BUILTIN_DEFAULTS: dict[str, Callable[[Object], Object]] = {
    "Job": _job,
    "Pod": _pod,
    "Namespace": _namespace,
    "Secret": _secret,
}


def with_job_selector(job: Object) -> Object:
    """The selector and pod labels the API server gives a Job when it is created (its uid must be set)."""
    labels = {
        "batch.kubernetes.io/controller-uid": job["metadata"]["uid"],
        "batch.kubernetes.io/job-name": job["metadata"]["name"],
        "controller-uid": job["metadata"]["uid"],
        "job-name": job["metadata"]["name"],
    }
    key = "batch.kubernetes.io/controller-uid"
    job["spec"]["selector"] = {"matchLabels": {key: labels[key]}}
    template = job["spec"]["template"].setdefault("metadata", {})
    template["labels"] = (template.get("labels") or {}) | labels
    return job


def refusals(resource: Resource, new: Object, old: Object | None) -> list[Cause]:
    """Why `new` may not be stored; empty when it may."""
    metadata = new["metadata"]
    name = metadata.get("name")
    if not name:
        return [Cause("metadata.name", "Required value: name or generateName is required", "FieldValueRequired")]
    if not _DNS_NAME.match(name) and resource.plural not in _COLON_NAMES:
        text = f'Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric'
        return [Cause("metadata.name", f"{text} characters, '-' or '.'")]
    if resource.schema is not None:
        return _custom_refusals(resource, new, old)
    return _changed_refusals(resource, new, old) if old else []


def _custom_refusals(resource: Resource, new: Object, old: Object | None) -> list[Cause]:
    body = {key: value for key, value in new.items() if key not in ("apiVersion", "kind", "metadata")}
    causes = list(standin_schema.problems(body, resource.schema or {}))
    if causes or resource.group != constants.GROUP or resource.kind not in _MODELS:
        return causes
    broken = _rule_refusals(new, resource.schema or {})
    if old:  # as the rule says: a name cannot change, and only a new one is checked
        broken = [cause for cause in broken if "metadata.name" not in cause.message]
    return [*broken, *(_immutability_refusals(new, old) if old else [])]


def _rule_refusals(job: Object, schema: Object) -> list[Cause]:
    """What the CRD's CEL rules would refuse, found by the models that hold the same rules."""
    metadata = {key: value for key, value in job["metadata"].items() if key in ("name", "namespace", "labels")}
    data = {"apiVersion": job["apiVersion"], "kind": job["kind"], "metadata": metadata, "spec": job["spec"]}
    try:
        manifest.check_as(_MODELS[job["kind"]], manifest.Document(data, ""))
    except manifest.ManifestError as error:
        return [
            Cause("", _as_cel(_name_rule(schema))) if p.field == "metadata.name" else Cause(p.field, _as_cel(p.message))
            for p in error.problems
        ]
    return []


def _name_rule(schema: Object) -> str:
    rules = schema.get("x-kubernetes-validations") or []
    return next(rule["message"] for rule in rules if rule["message"].startswith("metadata.name"))


def _as_cel(message: str) -> str:
    known = ("Invalid value", "Unsupported value", "Required value")
    return message if message.startswith(known) else f'Invalid value: "object": {message}'


def _frozen_refusals(new: Object, old: Object) -> list[Cause]:
    """What the transition rules of a sweep that has started refuse."""
    if not (old.get("status") or {}).get("startTime"):
        return []
    changed = [name for name in FROZEN if new["spec"].get(name) != old["spec"].get(name)]
    message = "Forbidden: cannot change once the sweep has started: create another sweep"
    return [Cause(f"spec.{name}", message, "FieldValueForbidden") for name in changed]


def _immutability_refusals(new: Object, old: Object) -> list[Cause]:
    if new["kind"] == constants.SWEEP_KIND:
        return _frozen_refusals(new, old)
    status = old.get("status") or {}
    attempts = status.get("attempts") or []
    has_run = any(a.get("runSeconds") or ("runSeconds" in a and "reason" not in a) for a in attempts)
    frozen = dict.fromkeys(IMMUTABLE, "an attempt exists" if attempts else "")
    frozen["image"] = "the job has run or ended" if has_run or "completionTime" in status else ""
    text = "Invalid value: {}: spec.{} cannot change once {}: delete the job and create it again"
    changed = [section for section in IMMUTABLE if new["spec"].get(section) != old["spec"].get(section)]
    return [Cause("", text.format('"object"', s, frozen[s]), "FieldValueForbidden") for s in changed if frozen[s]]


def _changed_refusals(resource: Resource, new: Object, old: Object) -> list[Cause]:
    immutable = "field is immutable"
    if resource.kind == "Job":
        fields = ["completions", "selector", "completionMode", "podFailurePolicy", "template"]
        if old["spec"].get("suspend") and not (old.get("status") or {}).get("startTime"):
            fields.remove("template")
        spec, before = new["spec"], old["spec"]
        changed = [field for field in fields if spec.get(field) != before.get(field)]
        return [Cause(f"spec.{field}", f"Invalid value: {immutable}") for field in changed]
    if resource.kind in ("ConfigMap", "Secret") and old.get("immutable") and new.get("data") != old.get("data"):
        return [Cause("data", f"Forbidden: {immutable} when `immutable` is set", "FieldValueForbidden")]
    return []
