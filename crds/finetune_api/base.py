"""The base of every API model, and rules over several fields that mean the same in CEL and in Python."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError


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
        """Return the rule as an entry of x-kubernetes-validations (KEP-2876)."""
        entry = {"rule": self.cel, "message": self.message}
        return entry | ({"fieldPath": f".{self.field}"} if self.field else {})


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


#: A number from a report. JSON has neither NaN nor infinity, so that either would make a whole status unwritable.
FiniteOrNone = Annotated[float | None, AfterValidator(_finite)]


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

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Treat a known field that is null as not given, as on the API server ("lora:" with nothing after it)."""
        if not isinstance(data, dict) or None not in data.values():
            return data
        known = {name for key, field in cls.model_fields.items() for name in (key, field.alias)}
        return {key: value for key, value in data.items() if value is not None or key not in known}

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        for rule in self.RULES:
            if not rule.check(self):
                # The message goes in as a value, for it may hold braces.
                raise PydanticCustomError("rule", "{message}", {"message": rule.message, "field": rule.field})
        return self

    def manifest(self) -> dict[str, Any]:
        """Return the model as it stands in YAML: camelCase, unset optional fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
