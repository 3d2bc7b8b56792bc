"""The comparison as a table: for people, and as JSON, CSV and Markdown. Pure."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune_cli.comparison import runs
from finetune_cli.comparison.runs import FALLING, METRICS, Run
from finetune_cli.output import formatting

if TYPE_CHECKING:
    from rich.table import Table

#: Differing values that are shown to people; programs get all.
MAX_COLUMNS = 10


def shown_value(metric: str, value: float | None) -> str:
    """Return a metric's value as people read it; empty without one."""
    if value is None:
        return ""
    return formatting.loss(value) if metric in FALLING else formatting.percent(value)


def before_and_after(run: Run, metric: str) -> str:
    """Return 'before → after' of a metric, or what there is of it."""
    before, after = run.metrics.get(f"{metric}Before"), run.metrics.get(metric)
    if before is None or after is None:
        return shown_value(metric, after)
    return f"{shown_value(metric, before)} → {shown_value(metric, after)}"


def header(found: Sequence[Run], most: int = MAX_COLUMNS) -> tuple[list[str], list[str], bool]:
    """Return the differing paths to show, the metrics, and whether phases differ from Succeeded."""
    return runs.differing(found)[:most], runs.measured(found), any(run.phase != "Succeeded" for run in found)


def rows(found: Sequence[Run], most: int = MAX_COLUMNS, longest: int = 40) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the rows of the table, as text: at most so many differing values, cut to `longest`."""
    paths, metrics, phases = header(found, most)
    names = runs.short_names(paths)
    titles = ["Run", *(["Phase"] if phases else []), *(names[path] for path in paths), *map(METRICS.get, metrics)]
    hours = any(run.gpu_hours for run in found)
    costs = [formatting.cost(run.usage) for run in found]
    titles += ["Time", *(["GPU-hours"] if hours else []), *(["Cost"] if any(costs) else [])]
    body = [
        [
            run.name,
            *([run.phase] if phases else []),
            *(_cut(run.values.get(path, ""), longest) for path in paths),
            *(before_and_after(run, metric) for metric in metrics),
            formatting.duration(run.seconds) if run.seconds is not None else "",
            *([formatting.number(run.gpu_hours) if run.gpu_hours is not None else ""] if hours else []),
            *([cost] if any(costs) else []),
        ]
        for run, cost in zip(found, costs, strict=True)
    ]
    return [title or "" for title in titles], body


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def table(found: Sequence[Run]) -> Table:
    """Return the table for a terminal. The best values are bold."""
    from rich.table import Table
    from rich.text import Text

    titles, body = rows(found)
    result = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    paths, metrics, phases = header(found)
    first = 1 + phases + len(paths)
    for at, title in enumerate(titles):
        # Where the terminal is too narrow, the values give way.
        least = None if 1 + phases <= at < first else max(len(title), *(len(cells[at]) for cells in body))
        result.add_column(title if title[:1].islower() else title.upper(), no_wrap=True, min_width=least)
    for run, cells in zip(found, body, strict=True):
        styled = [Text(cell) for cell in cells]
        for offset, metric in enumerate(metrics):
            if metric in run.metrics and run.metrics[metric] == runs.best_of(found, metric):
                styled[first + offset].stylize("bold green")
        result.add_row(*styled)
    return result


def left_out(found: Sequence[Run]) -> int:
    """Return how many differing values the table for people leaves out."""
    return max(0, len(runs.differing(found)) - MAX_COLUMNS)


def data(found: Sequence[Run]) -> dict[str, Any]:
    """Return the comparison for programs."""
    paths = runs.differing(found)
    return {
        "differing": paths,
        "runs": [
            {
                "name": run.name,
                "uri": run.uri,
                "phase": run.phase,
                "values": {path: run.values.get(path) for path in paths},
                "metrics": dict(run.metrics),
                "trainSeconds": run.seconds,
                "gpuHours": run.gpu_hours,
                "cost": run.usage and run.usage.cost,
                "currency": run.usage and run.usage.currency,
                "pricedGpuHours": run.usage and run.usage.priced_gpu_hours,
            }
            for run in found
        ],
    }


def as_csv(found: Sequence[Run]) -> str:
    """Return the comparison as CSV, metrics before and after in columns of their own."""
    paths, metrics, _ = header(found, runs.MAX_VALUES)
    columns = [name for metric in metrics for name in (f"{metric}Before", metric)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        map(_cell, ["run", "phase", "uri", *paths, *columns, "trainSeconds", "gpuHours", "cost", "currency"])
    )
    for run in found:
        texts = [run.name, run.phase, run.uri, *(run.values.get(path, "") for path in paths)]
        numbers = [*(run.metrics.get(column) for column in columns), run.seconds, run.gpu_hours]
        numbers.append(run.usage.cost if run.usage else None)
        currency = _cell((run.usage and run.usage.currency) or "")
        writer.writerow([*map(_cell, texts), *("" if number is None else number for number in numbers), currency])
    return out.getvalue().rstrip("\n")


def _cell(text: str) -> str:
    """Return text that no spreadsheet takes for a formula; a number stays one."""
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
    return text


def as_markdown(found: Sequence[Run]) -> str:
    """Return the comparison as a table of Markdown."""
    titles, body = rows(found)
    lines = [titles, ["---"] * len(titles), *body]
    return "\n".join("| " + " | ".join(map(_escaped, cells)) + " |" for cells in lines)


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is: no cell ends early, and nothing is a link, a tag or an image."""
    escaped = html.escape(text, quote=False).replace("\\", "\\\\")
    if escaped == "---":
        return escaped
    for mark in "|`*_[]!~$":
        escaped = escaped.replace(mark, "\\" + mark)
    return escaped
