"""Structural schemas of CRDs: defaults, unknown fields, and checks with the API server's own wording."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]


@dataclass(frozen=True)
class Cause:
    """One refused field, as in a Status' details.causes."""

    field: str
    message: str
    reason: str = "FieldValueInvalid"

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def with_defaults(value: Any, schema: Schema) -> Any:
    """A copy of `value` without nulls where none may be, and with the schema's defaults filled in, outside in."""
    if isinstance(value, dict):
        properties, extra = schema.get("properties") or {}, schema.get("additionalProperties")
        anything = extra if isinstance(extra, dict) else {"nullable": True}
        new = {
            name: item
            for name, item in value.items()
            if item is not None or (properties.get(name) or anything).get("nullable")
        }
        for name, sub in properties.items():
            if "default" in sub and name not in new:
                new[name] = copy.deepcopy(sub["default"])
        for name, item in new.items():
            sub = properties.get(name) or (extra if isinstance(extra, dict) else None)
            new[name] = with_defaults(item, sub) if sub else item
        return new
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [with_defaults(item, schema["items"]) for item in value]
    if isinstance(value, float) and value.is_integer() and schema.get("type") == "integer":
        return int(value)  # as Go writes it
    return value


def pruned(value: Any, schema: Schema, path: str = "") -> tuple[Any, list[str]]:
    """`value` without the fields the schema does not know, and the paths of those."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return value, []
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        pairs = [pruned(item, schema["items"], f"{path}[{i}]") for i, item in enumerate(value)]
        return [item for item, _ in pairs], [field for _, fields in pairs for field in fields]
    if not isinstance(value, dict) or schema.get("type") != "object":
        return value, []
    properties, extra = schema.get("properties") or {}, schema.get("additionalProperties")
    new, unknown = {}, []
    for name, item in value.items():
        at = f"{path}.{name}" if path else name
        sub = properties.get(name) or (extra if isinstance(extra, dict) else None)
        if sub is None:
            if not extra:
                unknown.append(at)
            else:
                new[name] = item
            continue
        new[name], more = pruned(item, sub, at)
        unknown += more
    return new, unknown


def problems(value: Any, schema: Schema, path: str = "") -> Iterator[Cause]:
    """What the schema refuses in `value`."""
    if value is None and schema.get("nullable"):
        return
    wrong = _type_problem(value, schema, path)
    if wrong:
        yield wrong
        return
    yield from _value_problems(value, schema, path)
    if isinstance(value, dict):
        yield from _object_problems(value, schema, path)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, item in enumerate(value):
            yield from problems(item, schema["items"], f"{path}[{index}]")


def _type_of(value: Any) -> str:
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _type_problem(value: Any, schema: Schema, path: str) -> Cause | None:
    found, wanted = _type_of(value), schema.get("type")
    if schema.get("x-kubernetes-int-or-string"):
        if found in ("integer", "string"):
            return None
        wanted = "integer,string"
    if not wanted or found == wanted or (wanted == "number" and found == "integer"):
        return None
    if wanted == "integer" and found == "number" and float(value).is_integer():
        return None
    message = f'Invalid value: "{found}": {path} in body must be of type {wanted}: "{found}"'
    return Cause(path, message, "FieldValueTypeInvalid")


def _value_problems(value: Any, schema: Schema, path: str) -> Iterator[Cause]:
    def invalid(text: str) -> Cause:
        shown = f'"{value}"' if isinstance(value, str) else str(value)
        return Cause(path, f"Invalid value: {shown}: {path} in body should {text}")

    if "enum" in schema and value not in schema["enum"]:
        allowed = ", ".join(f'"{item}"' if isinstance(item, str) else str(item) for item in schema["enum"])
        shown = f'"{value}"' if isinstance(value, str) else str(value)
        yield Cause(path, f"Unsupported value: {shown}: supported values: {allowed}", "FieldValueNotSupported")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum"), schema.get("maximum")
        if low is not None and (value < low or (schema.get("exclusiveMinimum") and value == low)):
            yield invalid(f"be greater than {'' if schema.get('exclusiveMinimum') else 'or equal to '}{low}")
        if high is not None and (value > high or (schema.get("exclusiveMaximum") and value == high)):
            yield invalid(f"be less than {'' if schema.get('exclusiveMaximum') else 'or equal to '}{high}")
    if isinstance(value, str):
        if len(value) < schema.get("minLength", 0):
            yield invalid(f"be at least {schema['minLength']} chars long")
        if len(value) > schema.get("maxLength", len(value)):
            yield Cause(path, f"Too long: may not be more than {schema['maxLength']} bytes", "FieldValueTooLong")
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield invalid(f"match '{schema['pattern']}'")
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield invalid(f"have at least {schema['minItems']} items")
        if len(value) > schema.get("maxItems", len(value)):
            text = f"Too many: {len(value)}: must have at most {schema['maxItems']} items"
            yield Cause(path, text, "FieldValueTooMany")
        if schema.get("x-kubernetes-list-type") == "set":
            for index, item in enumerate(value):
                if item in value[:index]:
                    yield Cause(f"{path}[{index}]", f'Duplicate value: "{item}"', "FieldValueDuplicate")


def _object_problems(value: dict[str, Any], schema: Schema, path: str) -> Iterator[Cause]:
    properties, extra = schema.get("properties") or {}, schema.get("additionalProperties")
    for name in schema.get("required", ()):
        if name not in value:
            yield Cause(f"{path}.{name}" if path else name, "Required value", "FieldValueRequired")
    for name, item in value.items():
        sub = properties.get(name) or (extra if isinstance(extra, dict) else None)
        if sub:
            yield from problems(item, sub, f"{path}.{name}" if path else name)
