"""How a line of the trainer's log reads, for `finetune run`, `finetune logs` and training/log.txt alike. Pure."""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Final

#: What every line has, or the text tells already.
_HIDDEN: Final = ("event", "level", "timestamp", "logger", "stage", "exception")
_LABELLED: Final = ("warning", "error", "critical")
_STEP: Final = re.compile(r"Step (\d+)")
#: Numbers of a step in their order: label and format; the same width in every line, so that columns stand.
_NUMBERS: Final = {
    "loss": ("loss", "7.4f"),
    "evalLoss": ("eval loss", "7.4f"),
    "learningRate": ("lr", ".2e"),
    "gradNorm": ("grad", "6.3f"),
    "tokensPerSecond": ("", "7,.0f"),
}
_UNITS: Final = {"tokensPerSecond": " tokens/s"}


def readable(entry: Mapping[str, object], *, details: bool) -> str:
    """Return a line for people: time, event, what else it tells.

    An event says its facts itself, so that what else is in `entry` is shown for warnings and errors only, or all of it
    with `details`. The numbers of a training step stand in columns.
    """
    level = str(entry.get("level", "info"))
    label = f"{level}: " if level in _LABELLED else ""
    rest = {key: value for key, value in entry.items() if key not in _HIDDEN}
    event = str(entry.get("event", ""))
    if step := _STEP.fullmatch(event):
        event = "  ".join([f"Step {step[1]:<5}", *_columns(rest)]).rstrip()
        rest = {key: value for key, value in rest.items() if key not in _NUMBERS}
        told = [f"{key} {value}" for key, value in rest.items() if details or key != "epoch"]
    else:
        told = [f"{key}={value}" for key, value in rest.items() if label or details]
    parts = "  ".join(filter(None, (_clock(entry.get("timestamp")), label + event, *told)))
    return f"{parts}\n{entry['exception']}" if entry.get("exception") else parts


def of_json(line: str) -> dict[str, object] | None:
    """Return what a JSON line of the trainer's log tells; None of any other line."""
    try:
        entry = json.loads(line) if line.startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and "event" in entry else None


def _columns(values: Mapping[str, object]) -> Iterator[str]:
    for key, (label, form) in _NUMBERS.items():
        if key in values:
            try:
                number = format(float(str(values[key])), form)
            except ValueError:
                number = str(values[key])
            yield f"{label} {number}{_UNITS.get(key, '')}" if label else f"{number}{_UNITS.get(key, '')}"


def _clock(timestamp: object) -> str:
    try:
        return datetime.fromisoformat(str(timestamp)).strftime("%H:%M:%S")
    except ValueError:
        return ""
