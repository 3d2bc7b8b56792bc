"""What Typer finds wrong with a call, in the words of the command line: the option, what was given, what it takes."""

from __future__ import annotations

import difflib
import re
import sys
from typing import Any

#: What a number that cannot be read is called, by the kind of pydantic's error.
_NO_NUMBER = {"int_parsing": "whole number", "int_from_float": "whole number", "float_parsing": "number"}
#: Bounds, by the name that pydantic gives them.
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_SHOWN = 40
_QUOTED = re.compile(r"'([^']*)'")


def explain(error: Exception, name: str) -> tuple[str, str] | None:
    """Return the sentence and the hint for a wrong call; None for an error that is none of Typer's.

    Args:
        error: What was raised.
        name: The command line's name.
    """
    # Typer keeps its exception classes private, save BadParameter, which is one of them.
    formatted = getattr(error, "format_message", None)
    if formatted is None:
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context else " ".join([name, *_given_command()])
    return _sentence(error, str(formatted())), f"{command} --help"


def _given_command() -> list[str]:
    """Return the command that was typed, for errors that do not know it."""
    return [word for word in sys.argv[1:2] if not word.startswith("-")]


def _sentence(error: Any, said: str) -> str:
    if extra := re.fullmatch(r"Got unexpected extra argument\(s\) \((.*)\)", said):
        return f"too many arguments: {extra[1]}"
    found = getattr(error.__cause__, "errors", None)
    if found is None:
        return said
    problem = found(include_url=False)[0]
    option = said.partition(": ")[0]
    return f"{option}: {_wrong_value(problem['type'], problem['input'], problem.get('ctx', {}), problem['msg'])}"


def _wrong_value(kind: str, value: Any, context: dict[str, Any], said: str) -> str:
    value = str(value) if len(str(value)) <= _SHOWN else f"{str(value)[:_SHOWN]}…"
    if kind in _NO_NUMBER:
        return f"{value!r} is no {_NO_NUMBER[kind]}"
    for bound, words in _BOUNDS.items():
        if bound in context:
            return f"{value!r} must be {words} {context[bound]:,.15g}"
    said = said.removeprefix("Value error, ").rstrip(".")
    given, *allowed = _QUOTED.findall(said)[:20] or [""]
    close = difflib.get_close_matches(given, allowed, 1, 0.6)
    return f"{said}; did you mean {close[0]!r}?" if close else said
