"""The four patch types. Pure: old object and patch in, new object out."""

import copy
from typing import Any

import jsonpatch
import jsonpointer

Object = dict[str, Any]

#: Lists that Kubernetes merges by a key, by the list's field name; the first key an entry has is the one.
MERGE_KEYS = {
    "conditions": ("type",),
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "volumeMounts": ("mountPath",),
    "ports": ("containerPort", "port"),
    "ownerReferences": ("uid",),
}


class PatchError(ValueError):
    """The patch cannot be carried out."""


def merge(old: Any, patch: Any) -> Any:
    """JSON merge patch, RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    new = copy.deepcopy(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            new.pop(key, None)
        else:
            new[key] = merge(new.get(key), value)
    return new


def strategic(old: Any, patch: Any) -> Any:
    """Strategic merge: like merge, but lists of MERGE_KEYS are merged entry by entry."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    new = copy.deepcopy(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if key.startswith("$"):
            continue
        if value is None:
            new.pop(key, None)
        elif isinstance(value, list) and key in MERGE_KEYS:
            new[key] = _merge_list(new.get(key) or [], value, MERGE_KEYS[key])
        else:
            new[key] = strategic(new.get(key), value)
    return new


def _merge_list(old: list[Any], patch: list[Any], keys: tuple[str, ...]) -> list[Any]:
    new = copy.deepcopy(old)
    for entry in patch:
        key = next((key for key in keys if isinstance(entry, dict) and key in entry), None)
        if key is None:
            return copy.deepcopy(patch)
        at = next((i for i, there in enumerate(new) if there.get(key) == entry[key]), None)
        if entry.get("$patch") == "delete":
            new = [there for there in new if there.get(key) != entry[key]]
        elif at is None:
            new.append(strategic({}, entry))
        else:
            new[at] = strategic(new[at], entry)
    return new


def json_patch(old: Object, operations: list[Object]) -> Object:
    """JSON patch, RFC 6902; PatchError when a test fails or a path is missing."""
    try:
        return jsonpatch.apply_patch(old, operations)
    except (jsonpatch.JsonPatchException, jsonpointer.JsonPointerException) as error:
        raise PatchError(f"the server rejected our request due to an error in our request: {error}") from error


def apply(old: Object, applied: Object, before: Object | None) -> Object:
    """Server-side apply of `applied`; `before` is what the same manager applied last (its absent fields are removed).

    Simpler than the real thing: no conflicts, and fields are not kept for the sake of a second owner.
    """
    without = _remove_absent(old, before, applied) if before else old
    return strategic(without, applied)


def _remove_absent(old: Any, before: Any, applied: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(before, dict) and isinstance(applied, dict)):
        return old
    new = {}
    for key, value in old.items():
        if key in before and key not in applied:
            continue
        if isinstance(value, list) and key in MERGE_KEYS and key in before:
            new[key] = _remove_absent_entries(value, before[key], applied[key], MERGE_KEYS[key])
        else:
            new[key] = _remove_absent(value, before.get(key), applied.get(key)) if key in before else value
    return new


def _remove_absent_entries(old: list[Any], before: list[Any], applied: list[Any], keys: tuple[str, ...]) -> list[Any]:
    def identity(entry: Any) -> Any:
        return next((entry[key] for key in keys if isinstance(entry, dict) and key in entry), None)

    gone = {identity(entry) for entry in before} - {identity(entry) for entry in applied}
    return [entry for entry in old if identity(entry) not in gone]
