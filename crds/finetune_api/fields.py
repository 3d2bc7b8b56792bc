"""Types of the spec's fields. Each holds its bounds for the schema, its CEL rules, and the same checks in Python."""

import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from finetune_api import patterns, uri
from finetune_api.patterns import TextRule


def refusal(message: str) -> PydanticCustomError:
    """Return the error that ends in `message`, which may hold braces."""
    return PydanticCustomError("said", "{message}", {"message": message})


def text_type(*rules: TextRule, max_length: int) -> Any:
    """Return a text of at most `max_length` characters that satisfies `rules`, told of in their order."""

    def check(value: str) -> str:
        for rule in rules:
            if not rule.holds(value):
                raise refusal(rule.message)
        return value

    validations: list[Any] = [rule.schema() for rule in rules]
    return Annotated[
        str,
        Field(max_length=max_length, json_schema_extra={"x-kubernetes-validations": validations}),
        AfterValidator(check),
    ]


def each_once(key: str) -> AfterValidator:
    """Return the check of a list whose items each have another `key`: to the API server, x-kubernetes-list-map-keys."""

    def check(found: list[Any]) -> list[Any]:
        counts = Counter(getattr(each, key) for each in found)
        if twice := next((each for each, count in counts.items() if count > 1), None):
            raise refusal(f"each {key} may be given once, and {twice} is there twice")
        return found

    return AfterValidator(check)


Name = text_type(patterns.NAME, max_length=253)
# The length is part of the pattern: 253 is what the API server allows any name.
JobName = text_type(patterns.JOB_NAME, max_length=253)
Revision = text_type(patterns.REVISION, patterns.REVISION_SEGMENTS, max_length=128)
ExtendedResource = text_type(patterns.EXTENDED_RESOURCE, max_length=253)
Image = text_type(patterns.IMAGE, max_length=512)
ReadableUri = text_type(*uri.rules(uri.READABLE), max_length=uri.MAX_LENGTH)
WritableUri = text_type(*uri.rules_with_name(uri.WRITABLE), max_length=uri.MAX_LENGTH)
StoreUri = text_type(*uri.rules(uri.WRITABLE), max_length=uri.MAX_LENGTH)
RepositoryUri = text_type(*uri.repository_rules(), max_length=200)
ImageUri = text_type(*uri.image_rules(), max_length=512)
RowTemplate = text_type(*patterns.ROW_TEMPLATE, max_length=4096)
Text = Annotated[str, Field(min_length=1, max_length=256)]
Switch = Literal["auto", "enabled", "disabled"]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seconds = Annotated[int, Field(ge=1, le=2**31 - 1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _int_or_string(rule: str, message: str, **more: Any) -> Any:
    validations: list[Any] = [{"rule": rule, "message": message}]
    schema: dict[str, Any] = {"x-kubernetes-int-or-string": True, "x-kubernetes-validations": validations}
    return Field(json_schema_extra=schema | more)


_QUANTITY = TextRule(
    r"^[0-9]+([.][0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$",
    'must be a quantity such as 4, "1.5", 500m, 16G or 16Gi',
)
_QUANTITY_LENGTH = 32
_BYTES = re.compile(r"([0-9.]+) ?([kmgtp])i?b?", re.IGNORECASE)


def _check_quantity(value: Any) -> Any:
    if isinstance(value, float):
        raise refusal(f"{_QUANTITY.message}: put {value:g} in quotes")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    if isinstance(value, str) and len(value) <= _QUANTITY_LENGTH:
        if _QUANTITY.holds(value):
            return value
        if likely := _BYTES.fullmatch(value):
            number, unit = likely[1], "k" if likely[2] in "kK" else likely[2].upper()
            raise refusal(f"{_QUANTITY.message}: {value} is written {number}{unit} or {number}{unit.upper()}i")
    raise refusal(_QUANTITY.message)


Quantity = Annotated[
    int | str,
    BeforeValidator(_check_quantity),
    _int_or_string(
        f"type(self) == string ? {_QUANTITY.cel_of('string(self)')} : self >= 0",
        _QUANTITY.message,
        maxLength=_QUANTITY_LENGTH,
    ),
]


def quantity_bytes(value: int | str) -> int:
    """Return the number that a quantity stands for, in whole bytes."""
    number = re.match("[0-9.]+", str(value))
    unit = str(value)[number.end() :] if number else ""
    factor = 1024 if unit.endswith("i") else 1000
    power = "kMGTP".find(unit[:1].replace("K", "k")) + 1 if unit not in ("", "m") else 0
    return int(float(number[0]) * factor**power / (1000 if unit == "m" else 1)) if number else 0


def _number_or(*words: str, least: int, most: int) -> list[Any]:
    """Return what makes a type of a number from `least` to `most`, or one of `words`."""
    message = f"must be {', '.join(words)} or a number from {least} to {most}"

    def check(value: Any) -> Any:
        if value not in words and (not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most):
            raise refusal(message)
        return value

    allowed = ", ".join(f"'{word}'" for word in words)
    rule = f"type(self) == string ? self in [{allowed}] : (self >= {least} && self <= {most})"
    return [BeforeValidator(check), _int_or_string(rule, message)]


MicroBatchSize = Annotated[int | Literal["auto"], *_number_or("auto", least=1, most=65_536)]
LayerCount = Annotated[int | Literal["auto"], *_number_or("auto", least=0, most=1024)]
Checkpointing = Annotated[
    int | Switch | Literal["selective"],
    *_number_or("auto", "enabled", "disabled", "selective", least=0, most=1024),
]


def _without_null_values(value: Any) -> Any:
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


MAX_LABEL_KEY = 317
ModuleName = text_type(patterns.MODULE, max_length=128)
LabelKey = text_type(patterns.LABEL_KEY, max_length=MAX_LABEL_KEY)
LabelValue = text_type(patterns.LABEL_VALUE, max_length=63)
NamespaceName = text_type(patterns.NAMESPACE, max_length=63)
_LONG_KEY = f"keys must have at most {MAX_LABEL_KEY} characters"
_BAD_KEY = f"a key {patterns.LABEL_KEY.message}"
_KEYS_RULES: list[Any] = [
    {"rule": f"self.all(key, size(key) <= {MAX_LABEL_KEY})", "message": _LONG_KEY},
    {"rule": f"self.all(key, {patterns.LABEL_KEY.cel_of('key')})", "message": _BAD_KEY},
]


def _check_keys(value: dict[str, str]) -> dict[str, str]:
    if any(len(key) > MAX_LABEL_KEY for key in value):
        raise refusal(_LONG_KEY)
    if not all(map(patterns.LABEL_KEY.holds, value)):
        raise refusal(_BAD_KEY)
    return value


#: The API server drops keys whose value is null.
Labels = Annotated[
    dict[str, LabelValue],  # type: ignore[valid-type]
    Field(max_length=32, json_schema_extra={"x-kubernetes-validations": _KEYS_RULES}),
    BeforeValidator(_without_null_values),
    AfterValidator(_check_keys),
]

#: Columns of all data formats.
COLUMNS = (
    "text",
    "prompt",
    "completion",
    "messages",
    "conversations",
    "system",
    "instruction",
    "input",
    "output",
    "tools",
    "chat_template_kwargs",
)
_COLUMNS_MESSAGE = f"must name columns of {', '.join(COLUMNS)}"


def _check_columns(value: dict[str, str]) -> dict[str, str]:
    if not set(value) <= set(COLUMNS):
        raise refusal(_COLUMNS_MESSAGE)
    return value


Columns = Annotated[
    dict[str, Text],
    Field(
        min_length=1,
        max_length=len(COLUMNS),
        json_schema_extra={
            "x-kubernetes-validations": [
                {"rule": f"self.all(name, name in {list(COLUMNS)})", "message": _COLUMNS_MESSAGE},
            ]
        },
    ),
    BeforeValidator(_without_null_values),
    AfterValidator(_check_columns),
]
