"""The comparison as one page of HTML that needs nothing else: no script, no font, no request. Pure.

All that is shown may have been written by others: every text goes through `_e`, and a Content-Security-Policy that
allows styles alone stands at the top.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from importlib import resources

from finetune_cli.comparison import chart, runs, table
from finetune_cli.comparison.chart import escaped as _e
from finetune_cli.comparison.record import thinned
from finetune_cli.comparison.runs import AnsweredRow, Run
from finetune_cli.output import formatting

#: Confusion matrices and answered rows on one page.
MAX_MATRICES = 12
MAX_ANSWERS = 60
#: Rows whose texts are shown at once.
_OPEN = 3
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, found: Sequence[Run], now: datetime) -> str:
    """Return the page: table, curves, confusion matrices, answers of the first two runs that have any, shared values.

    Args:
        title: What is compared.
        found: The runs.
        now: The time, in UTC.
    """
    return "".join(_page(title, found, now))


@cache
def _style() -> str:
    return resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")


def _page(title: str, found: Sequence[Run], now: datetime) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{_e(title)}</title><style>{_style()}</style></head><body><main>"
    yield f"<h1>{_e(title)}</h1><p class='dim'>{_e(_subtitle(found))} · {now:%Y-%m-%d %H:%M} UTC</p>"
    yield from _table(found)
    yield from _curves(found)
    yield from _matrices(found)
    yield from _answers(found)
    yield from _shared(found)
    yield "</main></body></html>\n"


def _subtitle(found: Sequence[Run]) -> str:
    known = [run.gpu_hours for run in found if run.gpu_hours is not None]
    hours = f" · {formatting.number(sum(known))} GPU-hours" if any(known) else ""
    cost = formatting.cost(*(run.usage for run in found))
    return f"{len(found)} run{'' if len(found) == 1 else 's'}{hours}{f' · {cost}' if cost else ''}"


def _swatch(index: int) -> str:
    return f"<i class='swatch b{index}'></i>" if index < chart.COLORS else "<i class='swatch rest'></i>"


def _table(found: Sequence[Run]) -> Iterator[str]:
    titles, body = table.rows(found, runs.MAX_VALUES, runs.MAX_LENGTH)
    paths, metrics, phases = table.header(found, runs.MAX_VALUES)
    first = 1 + phases + len(paths)
    yield "<section class='wide'><table><thead><tr>"
    yield "".join(f"<th{' class=number' if at >= first else ''}>{_e(name)}</th>" for at, name in enumerate(titles))
    yield "</tr></thead><tbody>"
    for index, (run, cells) in enumerate(zip(found, body, strict=True)):
        best = {
            first + at
            for at, metric in enumerate(metrics)
            if metric in run.metrics and run.metrics[metric] == runs.best_of(found, metric)
        }
        yield f"<tr><th scope='row'>{_swatch(index)}{_e(cells[0])}</th>"
        for at, cell in enumerate(cells[1:], 1):
            kind = "best number" if at in best else "number" if at >= first else ""
            yield f"<td{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{_e(cell)}</td>"
        yield "</tr>"
    yield "</tbody></table></section>"


def _curves(found: Sequence[Run]) -> Iterator[str]:
    yield "<div class='charts'>"
    for title, key in (("Held-out loss", "held_out"), ("Training loss", "train")):
        drawn = [
            chart.Curve(run.name, index, thinned(getattr(run.curves, key), chart.MAX_POINTS))
            for index, run in enumerate(found)
        ]
        if picture := chart.svg(drawn, title):
            yield f"<section><h2>{title}</h2><p class='dim'>nats per token, over optimizer steps</p>{picture}"
            yield f"<p class='legend'>{''.join(_legend(drawn))}</p></section>"
    yield "</div>"


def _legend(drawn: Sequence[chart.Curve]) -> Iterator[str]:
    shown = [curve for curve in drawn if len(curve.points) > 1]
    for curve in shown[: chart.COLORS]:
        yield f"<span>{_swatch(curve.color)}{_e(curve.name)}</span>"
    if len(shown) > chart.COLORS:
        yield f"<span>{_swatch(chart.COLORS)}{len(shown) - chart.COLORS} more</span>"


def _matrices(found: Sequence[Run]) -> Iterator[str]:
    known = [(index, run, matrix) for index, run in enumerate(found) if (matrix := runs.confusion(run))]
    if not known:
        return
    yield "<section><h2>Confusion matrices</h2><p class='dim'>rows: the right label, columns: the label read</p>"
    yield "<div class='matrices'>"
    for index, run, (rights, reads, counts) in known[:MAX_MATRICES]:
        yield f"<figure><figcaption>{_swatch(index)}{_e(run.name)}</figcaption><table class='matrix'><tr><td></td>"
        yield "".join(f"<th>{_e(read)}</th>" for read in reads) + "</tr>"
        for right in rights:
            total = sum(counts.get((right, read), 0) for read in reads) or 1
            yield f"<tr><th scope='row'>{_e(right)}</th>"
            for read in reads:
                count = counts.get((right, read), 0)
                kind = "hit" if right == read else "miss"
                yield f"<td class='{kind}' style='--share:{min(1.0, max(0.0, count / total)):.2f}'>{count}</td>"
            yield "</tr>"
        yield "</table></figure>"
    yield "</div>"
    if len(known) > MAX_MATRICES:
        yield f"<p class='dim'>… and {len(known) - MAX_MATRICES} more</p>"
    yield "</section>"


def _answers(found: Sequence[Run]) -> Iterator[str]:
    answered = [(index, run) for index, run in enumerate(found) if run.answers][:2]
    if len(answered) < 2:
        return
    (first, one), (second, other) = answered
    pairs = runs.same_rows(one, other)
    if not pairs:
        return
    differ = sum(mine.right != theirs.right for mine, theirs in pairs)
    yield "<section><h2>Answers</h2><p class='dim'>"
    yield f"{_swatch(first)}{_e(one.name)} and {_swatch(second)}{_e(other.name)} on the same {len(pairs)} held-out"
    yield f" rows: {differ} that only one has right, shown first</p>"
    for number, (mine, theirs) in enumerate(pairs[:MAX_ANSWERS]):
        is_open = " open" if number < _OPEN and mine.right != theirs.right else ""
        yield f"<details{is_open}><summary>{_mark(mine)}{_mark(theirs)} row {mine.row}"
        yield f" <span class='dim'>{_e(mine.prompt, 120)}</span></summary>"
        yield f"<h3>Prompt</h3><pre>{_e(mine.prompt)}</pre><h3>Right answer</h3><pre>{_e(mine.expected)}</pre>"
        yield "<div class='pair'>"
        for index, run, each in ((first, one, mine), (second, other, theirs)):
            yield f"<div><h3>{_swatch(index)}{_e(run.name)} {_mark(each)}</h3><pre>{_e(each.answer)}</pre></div>"
        yield "</div></details>"
    if len(pairs) > MAX_ANSWERS:
        yield f"<p class='dim'>… and {len(pairs) - MAX_ANSWERS} rows more: training/answers.jsonl has them</p>"
    yield "</section>"


def _mark(answer: AnsweredRow) -> str:
    return "<b class='right'>✓ right</b>" if answer.right else "<b class='wrong'>✗ wrong</b>"


def _shared(found: Sequence[Run]) -> Iterator[str]:
    same = runs.shared(found)
    if same:
        yield f"<section><details><summary>{len(same)} values that all runs share</summary><table class='shared'>"
        yield "".join(f"<tr><th scope='row'>{_e(path)}</th><td>{_e(value)}</td></tr>" for path, value in same.items())
        yield "</table></details></section>"
