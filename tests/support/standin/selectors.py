"""Label and field selectors. Pure."""

import re
from collections.abc import Callable
from typing import Any

Object = dict[str, Any]
Match = Callable[[Object], bool]

_SET = re.compile(r"^(\S+)\s+(in|notin)\s+\(([^)]*)\)$")


def matcher(label_selector: str, field_selector: str) -> Match:
    """Whether an object meets both selectors; empty selectors match all. ValueError for one that cannot be read."""
    labels = [_label_test(part) for part in _split(label_selector)]
    fields = [_field_test(part) for part in _split(field_selector)]

    def matches(obj: Object) -> bool:
        have = obj["metadata"].get("labels") or {}
        return all(test(have) for test in labels) and all(test(obj) for test in fields)

    return matches


def _split(selector: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^(]*\))", selector) if part.strip()]


def _label_test(part: str) -> Callable[[dict[str, str]], bool]:
    found = _SET.match(part)
    if found:
        key, operator, listed = found.groups()
        values = {value.strip() for value in listed.split(",")}
        return lambda labels: (labels.get(key) in values) == (operator == "in")
    if "!=" in part:
        key, value = (text.strip() for text in part.split("!=", 1))
        return lambda labels: labels.get(key) != value
    if "=" in part:
        key, value = (text.strip() for text in re.split("==?", part, maxsplit=1))
        return lambda labels: labels.get(key) == value
    if part.startswith("!"):
        return lambda labels: part[1:].strip() not in labels
    if " " in part:
        raise ValueError(f"unable to parse requirement: {part!r}")
    return lambda labels: part in labels


def _field_test(part: str) -> Match:
    negative = "!=" in part
    path, value = (text.strip() for text in re.split("!=|==?", part, maxsplit=1))

    def test(obj: Object) -> bool:
        found: Any = obj
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        text = "" if found is None else str(found).lower() if isinstance(found, bool) else str(found)
        return (text == value) != negative

    return test
