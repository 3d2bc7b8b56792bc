"""What an API server may answer, read as far as everything here takes it for granted."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from finetune_api import constants

Object = dict[str, Any]


def read_object(found: Any) -> Object:
    """Return what an API server stores. Raises ValueError for what none does: a proxy, or another program, says it."""
    metadata = found.get("metadata") if isinstance(found, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        raise ValueError("it is no object with a name")
    if not isinstance(metadata.get("labels") or {}, dict):
        raise ValueError("its labels are none")
    return dict(found)


def read_job(found: Any) -> Object:
    """Return a FineTuneJob, as far as everything here takes it for granted. Raises ValueError if it is none."""
    job = read_object(found)
    if not isinstance(job["metadata"].get("namespace"), str):
        raise ValueError("it is no object in a namespace")
    datetime.fromisoformat(str(job["metadata"].get("creationTimestamp") or "2000-01-01"))
    if not all(isinstance(job.get(part) or {}, dict) for part in ("spec", "status")):
        raise ValueError("its spec or its status is no object")
    return job


def fault_of(found: Any) -> str:
    """Return why `found` is no FineTuneJob, or ''."""
    try:
        read_job(found)
    except ValueError as error:
        return str(error)
    return ""


def attempt_of(pod: Object) -> int:
    """Return the attempt a pod belongs to; 0 when it does not say."""
    label = str((pod["metadata"].get("labels") or {}).get(constants.LABEL_ATTEMPT, ""))
    return int(label) if label.isdigit() else 0


def index_of(pod: Object) -> int:
    label = str((pod["metadata"].get("labels") or {}).get("batch.kubernetes.io/job-completion-index", "0"))
    return int(label) if label.isdigit() else 0
