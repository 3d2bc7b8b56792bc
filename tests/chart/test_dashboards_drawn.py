"""The pictures of the dashboards: nothing overprints anything else or sticks out, whatever a Prometheus says.

The answers are simulated; scripts/dashboard_images.py draws those of a real Prometheus.
"""

import re
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.docs.chart import ROOT
from support.docs.dashboards import load, panels

EVERY_DASHBOARD = pytest.mark.parametrize("name", ["fleet", "job", "sweep", "compare"])
#: Longest labels one meets: a pod's name is cut to 63 characters.
LABELS = {
    "pod": "instruction-tuning-{0}-vxcqg",
    **dict.fromkeys(("phase", "reason", "error", "stage", "verb", "resource", "kind", "gpu"), "CheckingData{0}"),
    "attempt": "1{0}",
    "alertname": "FineTuneJobFailingRepeatedly{0}",
    "trial": "learning-rate-2e-4-rank-64-alpha-128-s{0}",
    "namespace": "natural-language-research-{0}",
    "name": "instruction-tuning-{0}",
    "cost_label": "language-research-{0}",
    "severity": "critical",
}
EXTREMES = pytest.mark.parametrize(
    ("minutes", "size"), [(4, 0), pytest.param(90, 3e-5, marks=pytest.mark.nightly), (3000, 987_654_321)]
)


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """scripts/draw_dashboard.py"""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import draw_dashboard

    yield draw_dashboard
    sys.modules.pop("draw_dashboard")


def simulated(drawing: ModuleType, minutes: float, size: float, series: int = 5) -> Any:
    """A source that answers every query with so many series that reach from 0 to `size`."""

    class Simulated(drawing.Source):  # type: ignore[misc, name-defined]
        def range(self, expr: str) -> list[dict[str, Any]]:
            moments = [self.start + self.step * point for point in range(200)]
            labels = {word for kept in re.findall(r" by \((.+?)\)", expr) for word in kept.split(", ")} or LABELS
            return [
                {
                    "metric": {key: value.format(number) for key, value in LABELS.items() if key in labels},
                    "values": [[moment, str(size * point / 199)] for point, moment in enumerate(moments)],
                }
                for number in range(series)
            ]

        def instant(self, expr: str) -> list[dict[str, Any]]:
            return [{"metric": one["metric"], "value": one["values"][-1]} for one in self.range(expr)]

    return Simulated(
        "",
        1_700_000_000,
        1_700_000_000 + 60 * minutes,
        {"namespace": "research", "job": "nli", "sweep": "nli", "label": ".*"},
    )


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether two boxes (x0, y0, x1, y1) share more than an edge of a pixel."""
    return all(max(one[axis], other[axis]) + 1 < min(one[axis + 2], other[axis + 2]) for axis in (0, 1))


@EVERY_DASHBOARD
@EXTREMES
def test_no_text_lies_on_another_or_outside_the_picture(
    drawing: ModuleType, name: str, minutes: float, size: float
) -> None:
    figure, empty = drawing.paint(load(name), simulated(drawing, minutes, size), "A note below the title.")
    assert empty == []
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(drawing.mpl.text.Text) if text.get_visible() and text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent().extents.tolist()) for text in texts]
    _, _, right, top = figure.bbox.extents
    assert [text for text, (x0, y0, x1, y1) in boxes if min(x0, y0) < 0 or x1 > right or y1 > top] == []
    assert [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if overlap(one, other)] == []
    drawing.plt.close(figure)


@EVERY_DASHBOARD
def test_panels_without_data_are_named(drawing: ModuleType, name: str, tmp_path: Path) -> None:
    out = tmp_path / "empty.png"
    empty = drawing.draw(load(name), simulated(drawing, 4, 1, series=0), out)
    assert empty == [panel["title"] for panel in panels(load(name))]
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "s", "0 s"),
        (0.25, "s", "250 ms"),
        (300, "s", "5 min"),
        (6.5 * 2**30, "bytes", "6.5 GiB"),
        (0.421, "percentunit", "42.1 %"),
        (12_345, "short", "12.3 K"),
        (12_345, "locale", "12,345"),
        (1698.2, "suffix:tok/s", "1,698 tok/s"),
        (0.0002, "sci", "2e-4"),
        (1.5, "reqps", "1.5 req/s"),
        (float("nan"), "short", "–"),
    ],
)
def test_values_are_written_in_their_unit(drawing: ModuleType, value: float, unit: str, text: str) -> None:
    assert drawing.scaled(value, unit) == text
