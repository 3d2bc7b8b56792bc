"""Draw a dashboard's tables, and its charts of one metric over another."""

import math
from typing import Any

from dashboard_data import Source, scaled, ticks
from draw_card import GRAY, PALE, SMALL, Card, legend, overrides, palette, width

#: Labels that are columns, with their titles, as scripts/dashboards.py has them; others are left out.
_TITLES = {
    "namespace": "Namespace",
    "name": "Job",
    "trial": "Trial",
    "cost_label": "Label",
    "currency": "Currency",
    "alertname": "Alert",
    "severity": "Severity",
}


def table(card: Card, panel: dict[str, Any], source: Source) -> bool:
    """Draw a row for each set of labels; return whether there is one."""
    default, units = panel["fieldConfig"]["defaults"]["unit"], overrides(panel, "unit")
    columns = [target["legendFormat"] for target in panel["targets"]]
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for column, target in zip(columns, panel["targets"], strict=True):
        for result in source.instant(target["expr"]):
            key = tuple(result["metric"].get(label, "") for label in _TITLES)
            rows.setdefault(key, {})[column] = scaled(float(result["value"][1]), units.get(column, default))
    shown = [at for at in range(len(_TITLES)) if any(key[at] for key in rows)]
    lines = [[*(list(_TITLES.values())[at] for at in shown), *columns]]
    lines += [
        [*(key[at] for at in shown), *(row.get(each, "–") for each in columns)] for key, row in sorted(rows.items())
    ]
    widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
    gap = (card.width - 0.2 - sum(widths)) / len(widths)  # what is left is shared out evenly
    places = [0.1 + sum(widths[:column]) + gap * column for column in range(len(widths))]
    for number, cells in enumerate(lines[: int((card.height - 0.4) / 0.24)]):
        down = 0.46 + 0.24 * number
        for column, cell in enumerate(cells):
            style = {"fontweight": "bold", "color": GRAY} if number == 0 else {}
            card.text(places[column], down, cell, fontsize=8, **style)
        card.line([0.1, card.width - 0.1], down + 0.12, color=PALE, linewidth=0.8)
    return bool(rows)


def xychart(card: Card, panel: dict[str, Any], source: Source) -> bool:
    """Draw the second query's values over the first's, one line for each value of the label that tells them apart."""
    label = {title: name for name, title in _TITLES.items()}[panel["transformations"][-1]["options"]["fields"][0]]
    right, up = (source.range(target["expr"]) for target in panel["targets"])
    at = {_key(one): dict(one["values"]) for one in right}
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in up:
        found = [(float(at[_key(one)][t]), float(y)) for t, y in one["values"] if t in at.get(_key(one), {})]
        lines.setdefault(one["metric"][label], []).extend(point for point in found if math.isfinite(sum(point)))
    lines = {name: points for name, points in sorted(lines.items()) if points}
    if not lines:
        return False
    unit = panel["fieldConfig"]["defaults"]["unit"]
    flat = [point for points in lines.values() for point in points]
    low, high = min(y for _, y in flat), max(y for _, y in flat)
    low, high = low - 0.1 * (high - low), high + 0.1 * (high - low) or 1
    places = ticks(low, high, unit, False)
    labels = [scaled(place, unit, like=places[-1]) for place in places]
    left, colors = 0.2 + max(map(width, labels)), palette(list(lines), panel)
    axes = card.axes(left, 0.27 + legend(card, list(lines), colors), 0.2, 0.4)
    axes.set_yticks(places, labels)
    last = max(x for x, _ in flat) or 1
    steps = [place for place in ticks(0, last, "locale", True) if place < 0.95 * last]
    axes.set_xticks(steps, [scaled(step, "short") for step in steps], fontsize=SMALL)
    axes.set(xlim=(0, last), ylim=(low, high))
    for color, points in zip(colors, lines.values(), strict=True):
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.3)
    return True


def _key(one: dict[str, Any]) -> tuple[str | None, ...]:
    return tuple(one["metric"].get(label) for label in _TITLES)
