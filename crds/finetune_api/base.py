"""The base of every API model, and rules that mean the same in CEL and in Python."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from finetune_api import uri


@dataclass(frozen=True)
class Rule:
    """A rule over several fields: `cel` for the API server, `check` for Python, one `message` for both.

    `field` is the path of the field to blame, below the model that carries the rule ("evaluation.earlyStopping").
    """

    cel: str
    check: Callable[[Any], bool]
    message: str
    field: str = ""

    def schema(self) -> dict[str, str]:
        """The rule as an entry of x-kubernetes-validations (KEP-2876)."""
        entry = {"rule": self.cel, "message": self.message}
        return entry | ({"fieldPath": f".{self.field}"} if self.field else {})


class ApiModel(BaseModel):
    """camelCase outside, snake_case inside; unknown fields and silent conversions are refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
    )
    RULES: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        for rule in self.RULES:
            if not rule.check(self):
                # The message goes in as a value, for it may hold braces.
                raise PydanticCustomError("rule", "{message}", {"message": rule.message, "field": rule.field})
        return self

    def manifest(self) -> dict[str, Any]:
        """The model as it stands in YAML: camelCase, unset optional fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _uri_type(schemes: tuple[str, ...]) -> Any:
    rules = uri.rules(schemes)

    def check(value: str) -> str:
        for rule in rules:
            if not rule.holds(value):
                raise PydanticCustomError("uri", "{message}", {"message": rule.message})
        return value

    validations: list[Any] = [{"rule": rule.cel, "message": rule.message} for rule in rules]
    return Annotated[
        str,
        Field(max_length=uri.MAX_LENGTH, json_schema_extra={"x-kubernetes-validations": validations}),
        AfterValidator(check),
    ]


ReadableUri = _uri_type(uri.READABLE)
WritableUri = _uri_type(uri.WRITABLE)

_QUANTITY = r"^[0-9]+([.][0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"


def _check_quantity(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str) or not re.fullmatch(_QUANTITY, str(value)):
        raise PydanticCustomError("quantity", "must be a quantity such as 4, 500m or 16Gi")
    return value


Quantity = Annotated[
    int | str,
    BeforeValidator(_check_quantity),
    Field(json_schema_extra={"x-kubernetes-int-or-string": True, "pattern": _QUANTITY}),
]
