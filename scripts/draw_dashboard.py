"""Draw a dashboard of the chart as a PNG, panel by panel where Grafana would place it, from a Prometheus' answers.

python scripts/draw_dashboard.py job job.png --prometheus http://localhost:9090 \
    --minutes 30 --var namespace=research --var job=nli
"""

import argparse
import json
import math
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from dashboard_data import Series, Source, log_ticks, scaled, series_of, ticks, time_ticks
from draw_card import COLORS, GRAY, PALE, SMALL, Card, legend, palette, width
from draw_table import table, xychart
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import NullFormatter, NullLocator

FOLDER = Path(__file__).parents[1] / "charts" / "finetune-operator" / "files" / "dashboards"
CELL_WIDTH, CELL_HEIGHT, HEADER = 0.54, 0.32, 0.75  # inches: of one grid cell, and of what is above the grid
STYLE = {
    "font.size": SMALL, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.edgecolor": PALE, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#eef0f2", "xtick.color": GRAY,
    "ytick.color": GRAY, "ytick.major.size": 0, "xtick.major.size": 2,
}  # fmt: skip


def draw(dashboard: dict[str, Any], source: Source, out: Path, note: str = "", dpi: int = 125) -> list[str]:
    """Draw to `out` (PNG) with `note` below the title; the titles of panels that had no data."""
    figure, empty = paint(dashboard, source, note)
    figure.savefig(out, dpi=dpi, pil_kwargs={"optimize": True})
    plt.close(figure)
    return empty


@mpl.rc_context(STYLE)
def paint(dashboard: dict[str, Any], source: Source, note: str = "") -> tuple[Figure, list[str]]:
    """Return the figure, and the titles of panels that had no data."""
    cells = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in dashboard["panels"])
    width, height = 24 * CELL_WIDTH + 0.2, cells * CELL_HEIGHT + HEADER + 0.1
    figure = plt.figure(figsize=(width, height), facecolor="#f4f5f6")
    page = Card(figure, 0, 0, width, height)
    told = "   ".join(f"{name}: {value}" for name, value in source.variables.items())
    page.text(0.2, 0.3, dashboard["title"], fontsize=14, fontweight="bold")
    page.text(0.2, 0.58, note, fontsize=8, color=GRAY)
    page.text(width - 0.2, 0.3, told.replace(".*", "All").replace("|", ", "), fontsize=9, color=GRAY, ha="right")
    source.mark(dashboard["annotations"]["list"])
    empty = []
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        left, down = 0.1 + place["x"] * CELL_WIDTH, HEADER + place["y"] * CELL_HEIGHT
        if panel["type"] == "row":
            page.text(left + 0.1, down + CELL_HEIGHT / 2, panel["title"], fontsize=10, fontweight="bold", color=GRAY)
            continue
        size = (place["w"] * CELL_WIDTH, place["h"] * CELL_HEIGHT)
        card = Card(figure, left + 0.04, height - down - size[1] + 0.04, size[0] - 0.08, size[1] - 0.08)
        _frame(card, panel["title"])
        if not _PAINTERS[panel["type"]](card, panel, source):
            card.text(card.width / 2, card.height / 2, "no data", color=GRAY, ha="center")
            empty.append(panel["title"])
    return figure, empty


def _frame(card: Card, title: str) -> None:
    style = {"facecolor": "white", "edgecolor": PALE, "linewidth": 0.8, "zorder": -1}
    shape = "round,pad=0,rounding_size=0.05"
    where = card.figure.dpi_scale_trans
    box = FancyBboxPatch((card.left, card.bottom), card.width, card.height, shape, transform=where, **style)
    card.figure.add_artist(box)
    card.text(0.1, 0.17, title, fontsize=8.5, fontweight="bold")


def _stat(card: Card, panel: dict[str, Any], source: Source) -> bool:
    found = series_of(panel, source)[:1]
    for _, times, values in found:
        latest = [value for value in values if math.isfinite(value)][-1]
        text = scaled(latest, panel["fieldConfig"]["defaults"]["unit"])
        card.text(0.1, 0.5, text, fontsize=min(19, 210 / len(text)))
        axes = card.axes(0.02, 0.03, 0.02, card.height - 0.42)
        axes.axis("off")
        axes.plot(times, values, color=COLORS[0], linewidth=1)
        axes.fill_between(times, values, color=COLORS[0], alpha=0.12, linewidth=0)
        axes.set(xlim=(source.start, source.end), ylim=(0, 1.05 * max(*filter(math.isfinite, values), 0) or 1))
    return bool(found)


def _timeseries(card: Card, panel: dict[str, Any], source: Source) -> bool:
    found = series_of(panel, source)
    defaults = panel["fieldConfig"]["defaults"]
    custom, unit = defaults["custom"], defaults["unit"]
    is_stacked = "stacking" in custom
    if is_stacked:  # what is always zero only lengthens the legend
        found = [series for series in found if any(value > 0 for value in series[2])] or found[:1]
    if not found:
        return False
    numbers = [value for _, _, values in found for value in values if math.isfinite(value)]
    low, high = min(numbers), max(numbers)
    rows = _together(found) if is_stacked else []
    if is_stacked:
        high = max(map(sum, zip(*rows[1:], strict=True)))
    if "scaleDistribution" in custom:
        low, high = (low / 1.4 or high / 1000, high * 1.4) if high > 0 else (0.1, 10)
        places = log_ticks(low, high)
        labels = [scaled(place, unit) for place in places]
    else:
        low = 0 if "axisSoftMin" in custom or is_stacked else low - 0.1 * (high - low)
        high = high + 0.1 * (high - low) or 1
        places = ticks(low, high, unit, unit == "short" and all(number == round(number) for number in numbers))
        labels = [scaled(place, unit, like=places[-1]) for place in places]
    left = 0.2 + max(width(label) for label in labels)
    names = [name for name, _, _ in found]
    colors = palette(names, panel)
    axes = card.axes(left, 0.27 + legend(card, names, colors), 0.2, 0.4)
    if "scaleDistribution" in custom:
        axes.set_yscale("log")
        axes.yaxis.set(minor_formatter=NullFormatter(), minor_locator=NullLocator())
    axes.set_yticks(places, labels)
    axes.set(ylim=(low, high), xlim=(source.start, source.end))
    moments = _moments(source, card.width - left - 0.2)
    form = "%H:%M:%S" if source.end - source.start < 1200 else "%H:%M"
    for color, times in source.marks:
        for moment in times:
            axes.axvline(moment, color=color, linewidth=0.7, linestyle=(0, (3, 2)), alpha=0.7)
    axes.set_xticks(moments, [f"{datetime.fromtimestamp(moment):{form}}" for moment in moments])
    if not is_stacked:
        for color, (_, times, values) in zip(colors, found, strict=True):
            axes.plot(times, values, color=color, linewidth=1.3)
    elif custom.get("drawStyle") == "bars":
        _bars(axes, rows, colors)
    else:
        axes.stackplot(rows[0], rows[1:], colors=colors, alpha=0.75)
    return True


def _moments(source: Source, width: float) -> list[float]:
    """Ticks for a time axis of so many inches; none whose label would stick out of the card."""
    found = time_ticks(source.start, source.end, int(width / 0.48))
    inch = (source.end - source.start) / width
    return [moment for moment in found if moment - source.start > 0.1 * inch and source.end - moment > 0.1 * inch]


def _together(found: Series) -> list[list[float]]:
    """Return the moments, then each series' values at them, zero where it has none."""
    moments = sorted({moment for _, times, _ in found for moment in times})
    known = [dict(zip(times, values, strict=True)) for _, times, values in found]
    finite = [{moment: value for moment, value in one.items() if math.isfinite(value)} for one in known]
    return [moments, *([one.get(moment, 0.0) for moment in moments] for one in finite)]


def _bars(axes: Axes, rows: list[list[float]], colors: list[str]) -> None:
    moments, *values = rows
    below = [0.0] * len(moments)
    for color, row in zip(colors, values, strict=True):
        axes.bar(moments, row, bottom=below, color=color, width=(moments[-1] - moments[0]) / max(1, len(moments) - 1))
        below = [a + b for a, b in zip(below, row, strict=True)]


_PAINTERS = {"stat": _stat, "timeseries": _timeseries, "table": table, "xychart": xychart}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dashboard", choices=sorted(path.stem for path in FOLDER.glob("*.json")))
    parser.add_argument("out", type=Path)
    parser.add_argument("--prometheus", default="http://localhost:9090")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--var", action="append", default=[], help="name=value, as in the dashboard's variables")
    parser.add_argument("--note", default="", help="a sentence to write below the title")
    wanted = parser.parse_args()
    variables = {"namespace": ".*"} if wanted.dashboard == "fleet" else {}
    variables |= dict(item.split("=", 1) for item in wanted.var)
    now = time.time()
    source = Source(wanted.prometheus, now - 60 * wanted.minutes, now, variables)
    empty = draw(json.loads((FOLDER / f"{wanted.dashboard}.json").read_text()), source, wanted.out, wanted.note)
    for title in empty:
        sys.stderr.write(f"no data: {title}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
