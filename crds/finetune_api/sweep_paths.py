"""The paths of a FineTuneJob's spec that a sweep may set."""

import copy
import difflib
import itertools
from collections.abc import Iterator
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from finetune_api.base import ApiModel
from finetune_api.spec import FineTuneJobSpec

#: What the sweep itself decides for each trial.
_TAKEN = {
    "output": "each trial publishes to template.output.uri/<trial>/",
    "checkpoint.uri": "each trial saves to template.checkpoint.uri/<trial>/",
    "pack": "the sweep packs its trials itself: see its packing",
    "suspend": "suspend the sweep instead",
    "ttlSecondsAfterFinished": "give it to the sweep: trials go with it",
}


@cache
def known_paths() -> dict[str, FieldInfo]:
    """Return every path that a trial may set, with its field."""
    return {path: field for path, field in _paths(FineTuneJobSpec, "") if _taken(path) is None}


def _paths(model: type[ApiModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for field in model.model_fields.values():
        path = f"{prefix}{field.alias}"
        yield path, field
        if (below := _section(field.annotation)) is not None:
            yield from _paths(below, f"{path}.")


def _section(annotation: Any) -> type[ApiModel] | None:
    """Return the model that a field holds, if it holds one, and not a list of them."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((each for each in options if isinstance(each, type) and issubclass(each, ApiModel)), None)


def initials(name: str) -> str:
    """Return lr for learningRate."""
    return name[0] + "".join(char for char in name if char.isupper()).lower()


def _taken(path: str) -> str | None:
    return next((why for taken, why in _TAKEN.items() if f"{path}.".startswith(f"{taken}.")), None)


def problem(path: str) -> str | None:
    """Return why a trial may not set `path`; None when it may."""
    if path in known_paths():
        return None
    if why := _taken(path):
        return f"{path} cannot vary: {why}"
    parent, _, last = path.rpartition(".")
    ends = {known: known.rpartition(".") for known in known_paths()}
    same_end = [known for known, (_, _, end) in ends.items() if last in (end, initials(end)) and parent in known]
    siblings = [known for known, (above, _, _) in ends.items() if above == parent]
    if close := same_end or difflib.get_close_matches(path, siblings or list(ends), 1, 0.7):
        return f"{path} is no field of a FineTuneJob's spec; did you mean {close[0]}?"
    return f"{path} is no field of a FineTuneJob's spec, or lies in a list: see kubectl explain finetunejob.spec"


def overlap(paths: list[str]) -> tuple[str, str] | None:
    """Return two paths of which one holds the other: their values would depend on the order."""
    ordered = sorted(paths, key=lambda path: path.split("."))
    pairs = itertools.pairwise(ordered)
    return next(((one, other) for one, other in pairs if f"{other}.".startswith(f"{one}.")), None)


def is_whole_number(path: str) -> bool:
    """Return whether the field at `path` holds whole numbers."""
    return _holds_int(known_paths()[path].annotation)


def _holds_int(annotation: Any) -> bool:
    if isinstance(annotation, type):
        return issubclass(annotation, int) and annotation is not bool
    found = get_args(annotation)
    return any(map(_holds_int, found)) and float not in found


def with_value(spec: dict[str, Any], path: str, value: Any) -> None:
    """Set the field at `path` of a plain spec, to a copy of `value`; a section that is not there is made."""
    *sections, last = path.split(".")
    for section in sections:
        spec[section] = dict(spec.get(section) or {})
        spec = spec[section]
    spec[last] = copy.deepcopy(value)
