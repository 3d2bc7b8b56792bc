"""What a Job runs, as one digest: equal for a Job as we build it and as the API server stores it.

The API server fills in defaults and rewrites quantities; everything else that differs is another author's.
"""

import hashlib
from typing import Any

from pydantic_core import from_json, to_json

from finetune_api import constants
from finetune_api.spec import IMMUTABLE, FineTuneJobSpec
from finetune_operator.core.objects import quantity, raw
from finetune_operator.core.objects.raw import Raw

#: Set by the API server in every Job, or free to change at any time (suspend).
_NOT_COMPARED = ("selector", "suspend", "manualSelector")
_CONTROLLER_LABELS = [
    f"{prefix}{name}" for prefix in ("", "batch.kubernetes.io/") for name in ("controller-uid", "job-name")
]
#: An old name of serviceAccountName, which the API server always fills in beside it.
_ALIAS = "serviceAccount"
#: The API server's defaults, by field name. We set each of these fields wherever we mean something else.
_DEFAULTS: dict[str, Any] = {
    "apiVersion": "v1",
    "backoffLimit": 6,
    "defaultMode": 420,
    "dnsPolicy": "ClusterFirst",
    "optional": False,
    "protocol": "TCP",
    "schedulerName": "default-scheduler",
    "status": "True",
}
#: Sections of a spec that may change while an attempt runs.
_CHANGEABLE = {field.serialization_alias or name for name, field in FineTuneJobSpec.model_fields.items()} - set(
    IMMUTABLE
)
_QUANTITIES = frozenset({"limits", "requests"})


def digest_of(job: Raw) -> str:
    """Return the digest of what a batch/v1 Job runs and how."""
    spec = {key: value for key, value in raw.mapping(job, "spec").items() if key not in _NOT_COMPARED}
    template = raw.mapping(spec, "template")
    metadata = raw.mapping(template, "metadata")
    labels = {key: value for key, value in raw.mapping(metadata, "labels").items() if key not in _CONTROLLER_LABELS}
    notes = dict(raw.mapping(metadata, "annotations"))
    notes[constants.ANNOTATION_MANIFEST] = _manifest(notes.get(constants.ANNOTATION_MANIFEST))
    spec["template"] = {**template, "metadata": {**metadata, "labels": labels, "annotations": notes}}
    return hashlib.sha256(to_json(_normal(spec))).hexdigest()[:32]


def _manifest(text: Any) -> Any:
    """Return the manifest that a trainer reads without what may change in it at any time."""
    try:
        found = from_json(text)
    except (TypeError, ValueError):
        return text
    kept = {key: value for key, value in raw.mapping(found, "spec").items() if key not in _CHANGEABLE}
    return {**found, "spec": kept} if isinstance(found, dict) else text


def _normal(value: Any) -> Any:
    """Return the value without defaults and empty parts, with quantities as numbers."""
    if isinstance(value, list):
        return [_normal(each) for each in value]
    if not isinstance(value, dict):
        return value
    found: Raw = {}
    for key, each in sorted(value.items()):
        if isinstance(each, dict | list):
            kept = _amounts(each) if key in _QUANTITIES else _normal(each)
            if kept:
                found[key] = kept
        elif each not in (None, "", _DEFAULTS.get(key)) and key != _ALIAS:
            found[key] = _amount(each) if key == "sizeLimit" else each
    return found


def _amounts(values: Any) -> Any:
    return {name: _amount(amount) for name, amount in sorted(values.items())} if isinstance(values, dict) else values


def _amount(amount: Any) -> str:
    try:
        return str(quantity.value(amount).normalize())
    except ArithmeticError:
        return str(amount)
