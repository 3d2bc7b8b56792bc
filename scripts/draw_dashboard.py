"""Draw a dashboard of the chart as a PNG, panel by panel where Grafana would place it, from a Prometheus' answers.

    python scripts/draw_dashboard.py job job.png --prometheus http://localhost:9090 \
        --minutes 30 --var namespace=research --var job=nli
"""

import argparse
import json
import math
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.dates as mdates
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

FOLDER = Path(__file__).parents[1] / "charts" / "finetune-operator" / "files" / "dashboards"
POINTS = 240
CELL_WIDTH, CELL_HEIGHT = 0.62, 0.36  # inches of one grid cell
STYLE = {
    "font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#bbbbbb",
    "axes.grid": True, "grid.color": "#eeeeee", "xtick.color": "#666666", "ytick.color": "#666666",
    "axes.prop_cycle": mpl.cycler(color=["#3274d9", "#e0752d", "#37872d", "#a352cc", "#c4162a", "#0e9aa7", "#8d6e63"]),
}  # fmt: skip
Series = list[tuple[str, list[float], list[float]]]


@dataclass
class Source:
    """Where the data comes from: a Prometheus, a span of Unix time, and the dashboard's variables."""

    url: str
    start: float
    end: float
    variables: dict[str, str] = field(default_factory=dict)
    scrape_seconds: float = 30

    @property
    def step(self) -> float:
        """Seconds between two points."""
        return max(1.0, (self.end - self.start) / POINTS)

    def fill(self, expr: str) -> str:
        """`expr` with Grafana's variables replaced."""
        known = {
            "__rate_interval": f"{max(4 * self.scrape_seconds, self.step):.0f}s",
            "__range": f"{self.end - self.start:.0f}s",
            **self.variables,
        }
        for name, value in sorted(known.items(), key=lambda item: -len(item[0])):
            expr = expr.replace(f"${name}", value)
        return expr

    def range(self, expr: str) -> list[dict[str, Any]]:
        """The series of `expr` over the span. Raises OSError when Prometheus does not answer, or refuses."""
        query = {"query": self.fill(expr), "start": self.start, "end": self.end, "step": self.step}
        return self._get("query_range", query)

    def instant(self, expr: str) -> list[dict[str, Any]]:
        """The values of `expr` at the end of the span."""
        return self._get("query", {"query": self.fill(expr), "time": self.end})

    def _get(self, what: str, query: dict[str, Any]) -> list[dict[str, Any]]:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 (the user's own Prometheus)
            return list(json.load(answer)["data"]["result"])


def scaled(value: float, unit: str) -> str:
    """`value` as Grafana writes it in `unit`."""
    if math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    if unit == "h":
        return f"{value:.2g} h"
    if unit == "bytes":
        power = min(4, int(math.log(max(1.0, abs(value)), 1024)))
        return f"{value / 1024**power:.3g} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"
    if unit == "s":
        for limit, size, name in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (math.inf, 3600, "h")):
            if abs(value) < limit:
                return "0 s" if value == 0 else f"{value / size:.3g} {name}"
    suffix = {"reqps": " req/s", "cps": "/s"}.get(unit, "")
    return (f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}") + suffix


def series_of(panel: dict[str, Any], source: Source) -> Series:
    """(legend, times, values) of every series the panel's queries give."""
    found: Series = []
    for target in panel["targets"]:
        for result in source.range(target["expr"]):
            legend = target["legendFormat"]
            for label, value in result["metric"].items():
                legend = legend.replace("{{" + label + "}}", value)
            values = [(float(moment), float(value)) for moment, value in result["values"]]
            found.append((legend.split("{{")[0].strip(), *_with_gaps(values, 2.5 * source.step)))
    return found


def _with_gaps(points: list[tuple[float, float]], most: float) -> tuple[list[float], list[float]]:
    """Times and values, with a NaN wherever more than `most` seconds are missing, so that no line bridges it."""
    whole = points[:1]
    for before, after in pairwise(points):
        if after[0] - before[0] > most:
            whole.append((before[0] + most / 2, math.nan))
        whole.append(after)
    return [time for time, _ in whole], [value for _, value in whole]


def draw(dashboard: dict[str, Any], source: Source, out: Path, dpi: int = 110) -> list[str]:
    """Draw to `out` (PNG); the titles of panels that had no data."""
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in dashboard["panels"]) + 2
    empty = []
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(24 * CELL_WIDTH, height * CELL_HEIGHT), facecolor="white")
        figure.text(0.012, 1 - 1.1 / height, dashboard["title"], fontsize=14, fontweight="bold", va="center")
        told = "   ".join(f"{name}: {value}" for name, value in source.variables.items())
        figure.text(
            0.988, 1 - 1.1 / height, told.replace(".*", "All"), fontsize=9, color="#666666", va="center", ha="right"
        )
        for panel in dashboard["panels"]:
            place = panel["gridPos"]
            left, top = place["x"] / 24, 1 - (place["y"] + 2) / height
            if panel["type"] == "row":
                figure.text(left + 0.012, top - 0.5 / height, panel["title"], fontsize=10, color="#444444", va="center")
                continue
            heading = figure.text(
                left + 0.014, top - 0.55 / height, panel["title"], fontsize=9, fontweight="bold", va="center"
            )
            heading.set_in_layout(False)
            box = (
                left + 0.04,
                top - (place["h"] - 1.25) / height,
                place["w"] / 24 - 0.055,
                (place["h"] - 2.5) / height,
            )
            if not _PAINTERS[panel["type"]](figure.add_axes(box), panel, source):
                empty.append(panel["title"])
        figure.savefig(out, dpi=dpi)
        plt.close(figure)
    return empty


def _stat(axes: Axes, panel: dict[str, Any], source: Source) -> bool:
    axes.axis("off")
    found = series_of(panel, source)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    latest = [v for v in found[0][2] if math.isfinite(v)][-1:] if found else []
    text = scaled(latest[0], unit) if latest else "no data"
    axes.text(-0.2, 0.6, text, fontsize=20 if latest else 10, color="#222222" if latest else "#999999", va="center")
    return bool(latest)


def _timeseries(axes: Axes, panel: dict[str, Any], source: Source) -> bool:
    found = [(legend, t, v) for legend, t, v in series_of(panel, source) if any(map(math.isfinite, v))]
    custom = panel["fieldConfig"]["defaults"]["custom"]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if not found:
        axes.axis("off")
        why = "needs an NVIDIA GPU" if "NVIDIA GPU" in panel["description"] else "no data"
        axes.text(0.5, 0.5, why, color="#999999", ha="center", va="center")
        return False
    if "stacking" in custom:
        _stack(axes, found, custom.get("drawStyle") == "bars")
    else:
        for legend, times, values in found:
            axes.plot([datetime.fromtimestamp(t) for t in times], values, label=legend, linewidth=1.3)
    if "scaleDistribution" in custom:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif "axisSoftMin" in custom:
        top = max(v for _, _, values in found for v in values if math.isfinite(v))
        axes.set_ylim(bottom=0, top=None if top > 0 else 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scaled(value, unit)))
    axes.xaxis.set_major_formatter(mdates.DateFormatter("%H:%M" if source.end - source.start > 1200 else "%M:%S"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(datetime.fromtimestamp(source.start), datetime.fromtimestamp(source.end))
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.13), ncols=4, frameon=False, fontsize=6.5, handlelength=1)
    return True


def _stack(axes: Axes, found: Series, bars: bool) -> None:
    """Series on top of each other; those that are always zero are left out."""
    found = [series for series in found if any(series[2])] or found[:1]
    moments = sorted({t for _, times, _ in found for t in times})
    rows = []
    for _, times, values in found:
        at = {t: v for t, v in zip(times, values, strict=True) if math.isfinite(v)}
        rows.append([at.get(t, 0.0) for t in moments])
    places = [datetime.fromtimestamp(t) for t in moments]
    labels = [legend for legend, _, _ in found]
    if bars:
        below = [0.0] * len(moments)
        width = (moments[-1] - moments[0]) / max(1, len(moments)) / 86400
        for label, row in zip(labels, rows, strict=True):
            axes.bar(places, row, bottom=below, label=label, width=width)
            below = [a + b for a, b in zip(below, row, strict=True)]
    else:
        axes.stackplot(places, rows, labels=labels, alpha=0.75)


def _table(axes: Axes, panel: dict[str, Any], source: Source) -> bool:
    axes.axis("off")
    rows: dict[tuple[str, str], dict[str, str]] = {}
    columns = [target["legendFormat"] for target in panel["targets"]]
    for target in panel["targets"]:
        for result in source.instant(target["expr"]):
            key = (result["metric"]["namespace"], result["metric"]["name"])
            rows.setdefault(key, {})[target["legendFormat"]] = scaled(float(result["value"][1]), "none")
    if not rows:
        axes.text(0.5, 0.5, "no data", color="#999999", ha="center", va="center")
        return False
    cells = [[*key, *(row.get(column, "–") for column in columns)] for key, row in sorted(rows.items())][:10]
    table = axes.table(
        cells, colLabels=["Namespace", "Job", *columns], cellLoc="left", loc="upper left", edges="horizontal"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.scale(1, 1.3)
    for cell in table.get_celld().values():
        cell.set_edgecolor("#dddddd")
    return True


_PAINTERS = {"stat": _stat, "timeseries": _timeseries, "table": _table}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dashboard", choices=sorted(path.stem for path in FOLDER.glob("*.json")))
    parser.add_argument("out", type=Path)
    parser.add_argument("--prometheus", default="http://localhost:9090")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--var", action="append", default=[], help="name=value, as in the dashboard's variables")
    wanted = parser.parse_args()
    variables = {"namespace": ".*"} if wanted.dashboard == "fleet" else {}
    variables |= dict(item.split("=", 1) for item in wanted.var)
    now = time.time()
    source = Source(wanted.prometheus, now - 60 * wanted.minutes, now, variables)
    empty = draw(json.loads((FOLDER / f"{wanted.dashboard}.json").read_text()), source, wanted.out)
    for title in empty:
        sys.stderr.write(f"no data: {title}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
