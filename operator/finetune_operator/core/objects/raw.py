"""Read plain API objects without trusting their shape: a missing or wrongly typed field is empty, never an error."""

from datetime import UTC, datetime
from typing import Any, TypedDict

Raw = dict[str, Any]
#: Characters of a text that are read. Views stay in memory, and must not grow with what users write.
MAX_TEXT = 8192
#: What Kubernetes allows the value of a label.
MAX_LABEL = 63


def at(obj: Any, *path: str) -> Any:
    """Return the value at `path`, or None."""
    for key in path:
        obj = obj.get(key) if isinstance(obj, dict) else None
    return obj


def text(obj: Any, *path: str) -> str:
    """Return the text at `path`, at most MAX_TEXT characters of it."""
    value = at(obj, *path)
    return value[:MAX_TEXT] if isinstance(value, str) else ""


def integer(obj: Any, *path: str) -> int:
    value = at(obj, *path)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def decimal(obj: Any, *path: str) -> float | None:
    """Return the finite number at `path`; None where there is none."""
    value = at(obj, *path)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def flag(obj: Any, *path: str) -> bool:
    return at(obj, *path) is True


def mapping(obj: Any, *path: str) -> Raw:
    value = at(obj, *path)
    return value if isinstance(value, dict) else {}


def entries(obj: Any, *path: str) -> list[Raw]:
    """Return the objects of a list; anything else in it is skipped."""
    value = at(obj, *path)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def labels(obj: Any) -> dict[str, str]:
    found = mapping(obj, "metadata", "labels")
    return {key: value for key, value in found.items() if isinstance(value, str) and len(value) <= MAX_LABEL}


def timestamp(obj: Any, *path: str) -> datetime | None:
    """Return an RFC 3339 time, always with a zone, and early enough that a duration can be added."""
    try:
        parsed = datetime.fromisoformat(text(obj, *path))
    except ValueError:
        return None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)) if parsed.year < 9000 else None


def condition(obj: Any, kind: str) -> Raw:
    """Return the condition of that type when its status is True, else an empty one."""
    for entry in entries(obj, "status", "conditions"):
        if entry.get("type") == kind and entry.get("status") == "True":
            return entry
    return {}


def controller(obj: Any) -> Raw:
    """Return the owner reference that controls `obj`, or an empty one."""
    for owner in entries(obj, "metadata", "ownerReferences"):
        if owner.get("controller") is True:
            return owner
    return {}


def number(text: str) -> int:
    """Return a count that a name or label holds; 0 where it is none."""
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def version(obj: Any) -> int:
    """Return metadata.resourceVersion as a number (comparable within a resource: KEP-5504); 0 where it is none."""
    found = text(obj, "metadata", "resourceVersion")
    return int(found) if found.isdecimal() and len(found) < 20 else 0


class Identity(TypedDict):
    """What is known of every object of ours, from its metadata."""

    namespace: str
    name: str
    uid: str
    version: int
    generation: int
    created_at: datetime | None
    deleting: bool


def identity(obj: Raw) -> Identity:
    """Read it."""
    meta = mapping(obj, "metadata")
    return Identity(
        namespace=text(meta, "namespace"),
        name=text(meta, "name"),
        uid=text(meta, "uid"),
        version=version(obj),
        generation=min(max(0, integer(meta, "generation")), 2**53),
        created_at=timestamp(meta, "creationTimestamp"),
        deleting=bool(meta.get("deletionTimestamp")),
    )
