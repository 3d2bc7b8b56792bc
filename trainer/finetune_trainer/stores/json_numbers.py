"""Numbers that JSON can carry: it has neither NaN nor infinity, and parsers reject them."""

import math
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def drop_non_finite(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return `values` without those that are None, NaN or infinite."""
    return {key: value for key, value in values.items() if value is not None and not _is_non_finite(value)}


def _is_non_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
