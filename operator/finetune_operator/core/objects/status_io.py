"""Read the recorded status without trusting it; write the new one as a minimal merge patch."""

import json
from datetime import UTC, datetime
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from finetune_api.status import Condition, ConditionStatus, ConditionType, FineTuneJobStatus
from finetune_api.sweep_status import FineTuneSweepStatus
from finetune_operator.core.objects import raw
from finetune_operator.core.objects.raw import Raw

Status = FineTuneJobStatus | FineTuneSweepStatus
S = TypeVar("S", FineTuneJobStatus, FineTuneSweepStatus)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC).isoformat()


def read(status: bytes) -> FineTuneJobStatus:
    """Return the recorded status of a job: see read_as."""
    return read_as(FineTuneJobStatus, status)


def read_as(model: type[S], status: bytes) -> S:
    """Return the recorded status without the parts that we cannot read, of an older version or written by hand.

    No condition is left out for its details: what has finished must stay finished.
    """
    found = json.loads(status)
    if not isinstance(found, dict):
        return model()
    try:
        return model.model_validate(found)
    except ValidationError:
        return _salvage(model, found)


def _salvage(model: type[S], found: Raw) -> S:
    kept: Raw = {"conditions": [_condition(c) for c in raw.entries(found, "conditions") if _is_condition(c)]}
    for name, value in found.items():
        if name == "conditions":
            continue
        for candidate in (
            value,
            [v for v in value if _reads(model, name, [v])] if isinstance(value, list) else None,
        ):
            if _reads(model, name, candidate):
                kept[name] = candidate
                break
    return model.model_validate(kept)


def _reads(model: type[S], name: str, value: Any) -> bool:
    try:
        model.model_validate({name: value})
    except ValidationError:
        return False
    return True


def _is_condition(entry: Raw) -> bool:
    return entry.get("type") in get_args(ConditionType) and entry.get("status") in get_args(ConditionStatus)


def _condition(entry: Raw) -> Raw:
    """Return the condition, with its unreadable parts replaced."""
    try:
        Condition.model_validate(entry)
    except ValidationError:
        return {
            "type": entry["type"],
            "status": entry["status"],
            "reason": "Unreadable",
            "message": raw.text(entry, "message")[:1024],
            "lastTransitionTime": _EPOCH,
        }
    return entry


def condition(status: Status, kind: str) -> Condition | None:
    return next((c for c in status.conditions if c.type == kind), None)


def is_terminal(status: Status) -> bool:
    """Return whether a job or a sweep has ended. It then stays so, whatever happens to its children."""
    summary = condition(status, "Succeeded")
    return summary is not None and summary.status != "Unknown"


def merge_patch(old: Any, new: Any) -> Any:
    """Return the RFC 7396 patch that turns `old` into `new`; empty where they are equal. Lists are replaced whole."""
    patch: Raw = {}
    for key in old.keys() | new.keys():
        if key not in new:
            patch[key] = None
        elif isinstance(old.get(key), dict) and isinstance(new[key], dict):
            if inner := merge_patch(old[key], new[key]):
                patch[key] = inner
        elif key not in old or _differ(old[key], new[key]):
            patch[key] = new[key]
    return patch


def _differ(old: Any, new: Any) -> bool:
    """Return whether two JSON values differ. In Python, True equals 1."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) != len(new) or any(map(_differ, old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() != new.keys() or any(_differ(old[key], new[key]) for key in new)
    return bool(old != new) or isinstance(old, bool) != isinstance(new, bool)
