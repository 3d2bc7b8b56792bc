"""Loss curves laid over each other, as SVG that needs no script. Pure."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.plain_text import plain
from finetune_cli.output import formatting

WIDTH, HEIGHT = 760, 320
LEFT, RIGHT, TOP, BOTTOM = 74, 26, 14, 32
#: Runs with a color of their own; more are gray.
COLORS = 8
#: Points of one curve, and curves of one chart.
MAX_POINTS = 300
MAX_CURVES = 100
#: Ratio of the largest to the smallest value from which on the scale is logarithmic.
_WIDE = 3


def escaped(text: str, most: int = 1_500) -> str:
    """Return `text`, whoever wrote it, as text of HTML: at most so many characters, none that hides or reorders."""
    clean = plain(text)
    return html.escape(clean if len(clean) <= most else f"{clean[: most - 1]}…")


@dataclass(frozen=True)
class Curve:
    """One run's points, and the number of its color."""

    name: str
    color: int
    points: Sequence[tuple[int, float]]


def svg(curves: Sequence[Curve], title: str) -> str:
    """Return the chart; empty where no curve has two points."""
    drawn = [curve for curve in curves if len(curve.points) > 1][:MAX_CURVES]
    if not drawn:
        return ""
    steps = _ticks(0, max(step for curve in drawn for step, _ in curve.points), whole=True)
    values = [value for curve in drawn for _, value in curve.points]
    # A loss falls fast at first: on a logarithmic scale the ends, which are compared, are still told apart.
    is_log = min(values) > 0 and max(values) / min(values) > _WIDE
    levels = _powers(min(values), max(values)) if is_log else _ticks(min(values), max(values))
    x = _Scale(steps[0], steps[-1], LEFT, WIDTH - RIGHT)
    y = _Scale(levels[0], levels[-1], HEIGHT - BOTTOM, TOP, is_log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(title)}">']
    for level in levels:
        at = y(level)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{formatting.number(level)}</text>')
    below = HEIGHT - BOTTOM + 22
    parts += [f'<text x="{x(step)}" y="{below}" text-anchor="middle">{step:,.0f}</text>' for step in steps]
    # The first run, which is the best of a sweep, lies above the others.
    for curve in reversed(drawn):
        points = " ".join(f"{x(step)},{y(value)}" for step, value in curve.points)
        color = f"c{curve.color}" if curve.color < COLORS else "rest"
        parts.append(f'<polyline class="{color}" points="{points}"><title>{escaped(curve.name)}</title></polyline>')
    parts.append("</svg>")
    return "".join(parts)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(each) if self.is_log else each for each in (self.low, self.high, value))
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 1)


def _powers(low: float, high: float) -> list[float]:
    """Return round numbers for a logarithmic scale that hold the range between two positive ones."""
    least, most = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 1.5, 2, 3, 5, 7) if high / low < 1e3 else (1, 3) if most - least < 6 else (1,)
    found = [factor * 10.0**power for power in range(least, most + 1) for factor in factors]
    first = max(each for each in found if each <= low)
    last = min((each for each in found if each >= high), default=found[-1])
    return [each for each in found if first <= each <= last]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return four to eight round numbers that hold the range between them."""
    span = high - low or abs(high) or 1.0
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    step = max(1.0, math.ceil(step)) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]
