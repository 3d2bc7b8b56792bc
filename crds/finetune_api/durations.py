"""Durations as people write them: 90, 45s, 1.5h, 1h30m."""

import re
from typing import Final

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_NUMBER = "[0-9]+(?:[.][0-9]+)?"


def seconds(text: str) -> float | None:
    """Return the seconds of a duration; None if `text` is none."""
    if re.fullmatch(_NUMBER, text):
        return float(text)
    if not re.fullmatch(f"({_NUMBER} ?[smhd] ?)+", text):
        return None
    return sum(float(count) * _UNITS[unit] for count, unit in re.findall(f"({_NUMBER}) ?([smhd])", text))
