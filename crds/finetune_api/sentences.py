"""What a validation error of pydantic means, in the API server's words, and what to write in its place."""

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetune_api import constants, durations, suggestions, uri
from finetune_api.crd import model_of
from finetune_api.yaml_documents import NUMBER, Path_


def _shown(value: Any) -> str:
    if isinstance(value, str):
        value = uri.redacted(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "backslashreplace").decode()  # "\ud800" is text in YAML, and no terminal's
    return text if len(text) <= 120 else text[:119] + "…"


#: Longer text is not repeated with the correction.
_MAX_MEANT = 80
_JSON_TYPES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
_EXPECTED = {
    "int_type": "integer",
    "float_type": "number",
    "bool_type": "boolean",
    "string_type": "string",
    "list_type": "array",
    "dict_type": "object",
    "model_type": "object",
    "model_attributes_type": "object",
    "int_from_float": "integer",
}


def _field_at(root: type[BaseModel], path: Path_) -> FieldInfo | None:
    """Return the field of `root` that `path` names, its own or one below."""
    model: type[BaseModel] | None = root
    field = None
    for part in path:
        if isinstance(part, int):
            continue
        field = next((each for each in model.model_fields.values() if each.alias == part), None) if model else None
        model = model_of(field) if field else None
    return field


def _model_at(root: type[BaseModel], path: Path_) -> type[BaseModel] | None:
    """Return what `path` holds, where that is an object."""
    field = _field_at(root, path)
    return root if not path else model_of(field) if field else None


def _required_in(model: type[BaseModel] | None) -> list[str]:
    return [each.alias or "" for each in model.model_fields.values() if each.is_required()] if model else []


def _missing(root: type[BaseModel], path: Path_) -> str:
    """Return what belongs where a value is required."""
    if path == ("apiVersion",):
        return constants.API_VERSION
    field = _field_at(root, path)
    about = " ".join((field.description or "").split()) if field else ""
    about = about[:1].lower() + about[1:].partition(". ")[0].rstrip(".")
    below = ", ".join(_required_in(_model_at(root, path)))
    return ", ".join(filter(None, [about, f"with {below}" if below else ""]))


def _number_meant(value: str, path: Path_) -> str:
    """Return what to write in the place of text where a number is asked for, or ''."""
    if re.fullmatch(NUMBER, value.strip()):
        return "write it without quotes"
    if re.fullmatch(NUMBER, plain := value.replace(",", "").replace("_", "").strip()):
        return f"write {plain}"
    seconds = durations.seconds(value)
    if seconds is None:
        return ""
    return f"a number of seconds: {seconds:.15g}" if "seconds" in str(path[-1]).lower() else ""


def _object_meant(value: str, model: type[BaseModel] | None) -> str:
    """Return what to write in the place of text where an object is asked for, or ''."""
    key, colon, rest = value.partition(":")
    if model and colon and rest[:1] != "/" and key in [each.alias for each in model.model_fields.values()]:
        return f"a space belongs after the colon: {key}: {rest.strip()}"
    required = _required_in(model)
    return f"write {{{required[0]}: {value}}}" if len(required) == 1 else ""


def _meant(value: Any, expected: str, path: Path_, root: type[BaseModel]) -> str:
    """Return what to write in the place of a value of the wrong type, or ''."""
    if isinstance(value, list) and expected == "string" and path[-2:] == ("dataset", "train"):
        return "one place; dataset.sources mixes several"
    if expected == "string" and isinstance(value, bool | int | float):
        return "write it in quotes"
    if not isinstance(value, str) or len(value) > _MAX_MEANT or not value.isprintable():
        return ""
    value = uri.redacted(value)
    if expected in ("integer", "number"):
        return _number_meant(value, path)
    if expected == "boolean":
        return "write it without quotes" if value in ("true", "false") else "write true or false"
    if expected == "array":
        return f"write [{', '.join(value.replace(',', ' ').split())}]"
    return _object_meant(value, _model_at(root, path))


def sentence(error: Any, path: Path_, root: type[BaseModel]) -> str:
    """Return what is wrong with the field at `path`, what is allowed there, and what was probably meant.

    Args:
        error: One of pydantic's errors.
        path: The field.
        root: The model that holds it.
    """
    kind, value, context = error["type"], error.get("input"), error.get("ctx", {})
    if path == ("kind",):
        if kind == "missing":
            return f"Required value: {' or '.join(constants.KINDS)}"
        return _unsupported(value, [f"'{each}'" for each in constants.KINDS])
    if kind == "missing":
        return f"Required value{': ' if (about := _missing(root, path)) else ''}{about}"
    if kind == "extra_forbidden":
        if path[:1] == ("spec",) and (elsewhere := suggestions.meant(str(path[-1]))):
            return f"unknown field; did you mean {elsewhere}?"
        model = _model_at(root, path[:-1])
        known = [each.alias or "" for each in model.model_fields.values()] if model else []
        close = difflib.get_close_matches(str(path[-1]), known, 1, 0.6)
        return f"unknown field; did you mean {close[0]}?" if close else f"unknown field; known are {', '.join(known)}"
    if expected := _EXPECTED.get(kind):
        found = f": {_shown(value)}" if isinstance(value, str | int | float) else ""
        found += f" ({better})" if (better := _meant(value, expected, path, root)) else ""
        return f"Invalid value: {_shown(_JSON_TYPES.get(type(value), 'null'))}: must be of type {expected}{found}"
    if kind == "literal_error":
        return _unsupported(value, context["expected"].replace(" or ", ", ").split(", "))
    message = error["msg"]
    for start in ("Input should ", "String should ", "List should ", "Dictionary should "):
        if message.startswith(start):
            message = "should " + message.removeprefix(start)
    is_uri = message == uri.PARENT_MESSAGE or (message.startswith("must be ") and "://" in message)
    if is_uri and isinstance(value, str) and (why := uri.cause(value, hub="hf://" in message)):
        message = f"{message} ({why})"
    return message if kind == "rule" else f"Invalid value: {_shown(value)}: {message}"


def _unsupported(value: Any, allowed: Sequence[str]) -> str:
    """Return the sentence for a value that is none of the `allowed` ones, which may stand in quotes."""
    names = [each.strip("'") for each in allowed]
    folded = {each.casefold(): each for each in names}
    is_choice = isinstance(value, str) and len(names) > 1
    close = difflib.get_close_matches(value.casefold(), folded, 1, 0.6) if is_choice else []
    meant = f"; did you mean {folded[close[0]]}?" if close else ""
    listed = ", ".join(each.replace("'", '"') for each in allowed)
    return f"Unsupported value: {_shown(value)}: supported values: {listed}{meant}"
