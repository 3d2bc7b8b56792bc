"""The page of HTML: whole, bounded, and nothing in it but what we wrote, whatever the runs hold."""

import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from finetune_api.status import Usage
from finetune_cli.comparison import chart, report
from finetune_cli.comparison.runs import AnsweredRow, Curves, Run

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
ROWS = (
    AnsweredRow(0, "Is a spaniel a dog?", "yes", "yes, it is", True),
    AnsweredRow(1, "Is a cat a dog?", "no", "yes", False),
)
RUN = Run(
    "a", "s3://b/a", "Succeeded", {"lora.rank": "8"}, {"evalLoss": 0.5, "confusion.0.0": 3.0, "confusion.0.1": 1.0},
    1.5, Curves({1: 2.0, 2: 1.0}, {0: 2.0, 2: 0.5}), ROWS,
)  # fmt: skip
OTHER = replace(
    RUN,
    name="b",
    values={"lora.rank": "16"},
    metrics={"evalLoss": 0.4},
    answers=(ROWS[0], replace(ROWS[1], answer="no", right=True)),
)
ATTACKS = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</style></title></textarea><svg onload=alert(1)>",
    "<!-- --><base href=//evil><meta http-equiv=refresh content=0>",
    "&lt;script&gt; &#60;script&#62;",
    "\x1b]0;title\x07 \u202egnp.exe \ud800",
)


class Reader(HTMLParser):
    """What a browser would make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_the_page_shows_what_differs_and_the_answers_side_by_side() -> None:
    page = report.page("Two runs", [RUN, OTHER], NOW)
    text = " ".join(read(page).texts)
    for part in ("Two runs", "2 runs", "3 GPU-hours", "0.5000", "0.4000", "Held-out loss", "Training loss"):
        assert part in text
    priced = replace(RUN, usage=Usage(gpu_hours=2, cost=5, currency="<b>EUR", priced_gpu_hours=2))
    assert "3 GPU-hours · 5.00 <b>EUR" in " ".join(read(report.page("Two runs", [priced, OTHER], NOW)).texts)
    assert "the same 2 held-out rows: 1 that only one has right" in text
    assert page.index("Is a cat a dog?") < page.index("Is a spaniel a dog?"), "where only one is right comes first"
    assert page.count("<polyline") == 4


def test_the_page_asks_for_nothing_and_runs_nothing() -> None:
    page = report.page("Two runs", [RUN, OTHER], NOW)
    reader = read(page)
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "base", "form", "a"}
    assert not {name for name in reader.attributes if name.startswith("on")} | reader.attributes & {"src", "href"}
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_the_runs_hold_is_text(attack: str) -> None:
    innocent = read(report.page("x", [RUN, OTHER], NOW))
    rows = tuple(replace(each, prompt=attack, expected=attack, answer=attack) for each in ROWS)
    metrics = {"evalLoss": 0.5, f"confusion.{attack}.{attack}": 3.0}
    hostile = Run(attack, attack, attack, {attack: attack, "same": attack}, metrics, 1.0, RUN.curves, rows)
    page = report.page(attack, [hostile, replace(hostile, values={"same": attack})], NOW)
    reader = read(page)
    assert reader.tags <= innocent.tags | {"details", "summary"}
    assert reader.attributes <= innocent.attributes
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800]", page)


def test_a_page_of_a_thousand_runs_is_bounded() -> None:
    points = {step: 1.0 / (step + 1) for step in range(3_000)}
    row = AnsweredRow(0, "p" * 4000, "e" * 4000, "a" * 4000, True)
    rows = tuple(replace(row, row=number, right=number % 2 == 0) for number in range(200))
    wide = {f"lora.x{number}": "v" * 200 for number in range(20)}
    metrics = {f"confusion.{right}.{read}": 1.0 for right in range(8) for read in range(8)} | {"evalLoss": 1.0}
    many = [
        Run(f"run-{number}", "", "Succeeded", wide | {"n": str(number)}, metrics, None, Curves(points, points), rows)
        for number in range(200)
    ]
    page = report.page("many", many, NOW)
    assert len(page) < 3_000_000
    assert page.count("<polyline") <= 2 * chart.MAX_CURVES
    assert "192 more" in page and "rows more" in page


@pytest.mark.parametrize(
    "points",
    [
        {},
        {0: 1.0},
        {1: 0.0, 2: 0.0},
        {1: -5.0, 9: 1e14},
        {1: 1e-14, 2: 1e14},
        {0: 5.0, 1: float("nan")},
        {5: 3.0, 6: 3.0},
    ],
)
def test_any_curve_is_drawn_inside_its_frame(points: dict[int, float]) -> None:
    from finetune_cli.comparison.record import thinned

    picture = chart.svg([chart.Curve("x", 0, thinned(points, 300))], "x")
    for pair in re.findall(r"[-\d.e+]+,[-\d.e+]+", "".join(re.findall('points="([^"]*)"', picture))):
        x, y = map(float, pair.split(","))
        assert chart.LEFT <= x <= chart.WIDTH and 0 <= y <= chart.HEIGHT
