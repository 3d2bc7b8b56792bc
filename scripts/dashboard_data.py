"""What a dashboard's panels show, from a Prometheus: series, values in their unit, and round ticks. No drawing."""

import json
import math
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from matplotlib.ticker import MaxNLocator

POINTS = 240
DURATIONS = ((1, 1e-3, " ms"), (120, 1, " s"), (7200, 60, " min"), (math.inf, 3600, " h"))
TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
Series = list[tuple[str, list[float], list[float]]]


@dataclass
class Source:
    """Where the data comes from: a Prometheus, a span of Unix time, and the dashboard's variables."""

    url: str
    start: float
    end: float
    variables: dict[str, str] = field(default_factory=dict)
    scrape_seconds: float = 30
    marks: list[tuple[str, list[float]]] = field(default_factory=list)
    """Color and moments of each kind of annotation."""

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
        """Return the series of `expr` over the span. Raises OSError when Prometheus does not answer, or refuses."""
        query = {"query": self.fill(expr), "start": self.start, "end": self.end, "step": self.step}
        return self._get("query_range", query)

    def mark(self, annotations: list[dict[str, Any]]) -> None:
        """Ask for the annotations; one that holds for a while has its mark where it begins, as in Grafana."""
        for each in annotations:
            times = sorted({float(moment) for one in self.range(each["expr"]) for moment, _ in one["values"]})
            begun = [after for before, after in pairwise([-math.inf, *times]) if after - before > 1.5 * self.step]
            self.marks.append((each["iconColor"], begun))

    def instant(self, expr: str) -> list[dict[str, Any]]:
        """Return the values of `expr` at the end of the span."""
        return self._get("query", {"query": self.fill(expr), "time": self.end})

    def _get(self, what: str, query: dict[str, Any]) -> list[dict[str, Any]]:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 (the user's own Prometheus)
            return list(json.load(answer)["data"]["result"])


def scaled(value: float, unit: str, like: float | None = None) -> str:
    """`value` as Grafana writes it in `unit`, in the same multiple of it as `like`."""
    if math.isnan(value):
        return "–"
    if unit == "bool":
        return str(bool(value))
    if unit == "sci" and value:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if value == 0:
        return "0" + {"s": " s", "bytes": " B"}.get(unit, multiple(0, unit)[1])
    size, name = multiple(abs(value if like is None else like), unit)
    number = value / size
    return (f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}") + name


def multiple(value: float, unit: str) -> tuple[float, str]:
    """Return the multiple of `unit` that suits `value`, and its name."""
    if unit == "bytes":
        power = min(4, int(math.log(max(1.0, value), 1024)))
        return 1024**power, (" B", " KiB", " MiB", " GiB", " TiB")[power]
    if unit == "s":
        return next((size, name) for limit, size, name in DURATIONS if value < limit or limit == math.inf)
    if unit == "short":
        power = min(2, int(math.log(value, 1000))) if value >= 1000 else 0
        return 1000**power, ("", " K", " Mil")[power]
    if unit == "percentunit":
        return 0.01, " %"
    return 1, {"reqps": " req/s", "cps": " c/s", "h": " h"}.get(
        unit, unit.replace("suffix:", " ") * ("suffix:" in unit)
    )


def ticks(low: float, high: float, unit: str, is_whole: bool) -> list[float]:
    """About four round values of `unit` between `low` and `high`."""
    size, _ = multiple(high, unit)
    locator = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=is_whole)
    found = [float(value) * size for value in locator.tick_values(low / size, high / size)]
    return [value for value in found if low <= value <= high]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and where these are few their double and fivefold too."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    return [found for power in powers for factor in factors if low <= (found := factor * 10.0**power) <= high]


def time_ticks(start: float, end: float, most: int) -> list[float]:
    """Round moments, fewer than `most`."""
    step = next((step for step in TIME_STEPS if (end - start) / step < most), TIME_STEPS[-1])
    return [float(moment) for moment in range(math.ceil(start / step) * step, int(end) + 1, step)]


def series_of(panel: dict[str, Any], source: Source) -> Series:
    """(legend, times, values) of every series the panel's queries give; of one query's, those that begin first."""
    found: Series = []
    for target in panel["targets"]:
        results = sorted(source.range(target["expr"]), key=lambda result: float(result["values"][0][0]))
        for result in results:
            legend = target["legendFormat"]
            for label, value in result["metric"].items():
                legend = legend.replace("{{" + label + "}}", value)
            values = [(float(moment), float(value)) for moment, value in result["values"]]
            found.append((legend.split("{{")[0].strip(), *_with_gaps(values, 2.5 * source.step)))
    return [series for series in found if any(map(math.isfinite, series[2]))]


def _with_gaps(points: list[tuple[float, float]], most: float) -> tuple[list[float], list[float]]:
    """Return times and values, with a NaN wherever more than `most` seconds are missing, so that no line bridges it."""
    whole = points[:1]
    for before, after in pairwise(points):
        if after[0] - before[0] > most:
            whole.append((before[0] + most / 2, math.nan))
        whole.append(after)
    return [time for time, _ in whole], [value for _, value in whole]
