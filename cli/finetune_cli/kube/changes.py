"""Which fields of an object a write has changed. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_api.plain_text import one_line
from finetune_cli.kube.objects import Object

#: What the API server keeps in metadata for itself, and changes with any write.
_BOOKKEEPING = ("generation", "managedFields", "resourceVersion")
#: Deeper fields are told by the one that holds them.
MAX_DEPTH = 8


def changed_paths(before: Object, after: Object) -> list[str]:
    """Return the dotted paths of what a user sets whose values differ. The operator's status is none of it."""
    return list(_differing(_of_user(before), _of_user(after), ""))


def _of_user(found: Object) -> Object:
    metadata = {key: value for key, value in found["metadata"].items() if key not in _BOOKKEEPING}
    return {key: value for key, value in found.items() if key != "status"} | {"metadata": metadata}


def _differing(before: Any, after: Any, path: str, depth: int = 0) -> Iterator[str]:
    if before == after:
        return
    if not (isinstance(before, dict) and isinstance(after, dict)) or depth == MAX_DEPTH:
        yield path
        return
    for key in dict.fromkeys([*after, *before]):
        below = f"{path}.{one_line(str(key))}" if path else one_line(str(key))
        yield from _differing(before.get(key), after.get(key), below, depth + 1)
