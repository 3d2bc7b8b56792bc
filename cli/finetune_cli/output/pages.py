"""The pages of `finetune list`, `status` and `watch`: jobs in, Rich renderables out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from finetune_api import manifest
from finetune_api.plain_text import one_line
from finetune_api.status import Attempt
from finetune_api.trial_report import TrialReport
from finetune_cli.output import formatting
from finetune_cli.output.job_view import View
from finetune_cli.output.run_summary import gains, local_path

STYLES = {"succeeded": "green", "failed": "red", "suspended": "yellow", "waiting": "yellow", "running": "blue"}
MARKS = {"True": ("✓", "green"), "False": ("✗", "red"), "Unknown": ("·", "dim")}
#: Conditions whose False is bad news, save for the reason given to what is over.
ALARMING = ("Accepted", "Scheduled", "Succeeded")
OVER = "Finished"
BAR_WIDTH = 30
SPARK_WIDTH = 40
MIN_HISTORY = 3


def job_table(views: Sequence[View], now: datetime, *, namespaces: bool) -> Table:
    """Return the table of `finetune list`."""
    columns: list[tuple[str, list[str | Text]]] = [
        ("NAMESPACE", [view.namespace if namespaces else "" for view in views]),
        ("NAME", [Text(view.name, style="bold") for view in views]),
        ("PHASE", [Text(view.phase, style=STYLES[view.state]) for view in views]),
        ("STEP", [view.status.progress.summary if view.status.progress else "" for view in views]),
        ("LOSS", [_loss(view) for view in views]),
        ("LEFT", [_left(view, now) for view in views]),
        ("COST", [_cost(view) for view in views]),
        ("AGE", [formatting.age(view.created, now) for view in views]),
    ]
    # What is empty in every row is left out, for the reasons need the room.
    shown = [(title, cells) for title, cells in columns if any(map(str, cells))]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title, _ in shown:
        table.add_column(title, no_wrap=True)
    # The only column that gives way when the terminal is narrow.
    table.add_column("WHY / ADAPTER")
    for index, view in enumerate(views):
        table.add_row(*(cells[index] for _, cells in shown), _why_or_adapter(view))
    return table


def _loss(view: View) -> str:
    progress = view.status.progress
    return formatting.loss(progress.loss) if progress and progress.loss is not None else ""


def _cost(view: View) -> str:
    used = view.status.usage
    return formatting.money(used.cost, used.currency) if used and used.cost is not None else ""


def _why_or_adapter(view: View) -> Text:
    adapter = view.status.adapter
    words, style = (adapter.uri, "") if adapter else (view.why, "dim")
    return Text(one_line(words), style=style, no_wrap=True, overflow="ellipsis")


def _left(view: View, now: datetime) -> str:
    done = view.status.progress.estimated_completion_time if view.status.progress else None
    return formatting.duration((done - now).total_seconds()) if done and done > now and not view.is_over else ""


def status_page(view: View, now: datetime, losses: Sequence[float] = ()) -> RenderableType:
    """Return the page of `finetune status`. `losses` are training losses, oldest first, for the sparkline."""
    return Group(*_blocks(view, now, losses))


def _blocks(view: View, now: datetime, losses: Sequence[float]) -> Iterator[RenderableType]:
    yield _headline(view, now)
    yield _route(view)
    if view.status.progress and not view.is_over:
        yield Text()
        yield from _progress(view, now, losses)
    elif len(losses) >= MIN_HISTORY:
        yield Text()
        yield _loss_line(losses)
    if view.why:
        yield Text()
        yield from _explanation(view)
    yield from _section("Results", _results(view))
    yield from _section("Trials", _trials(view.status.trials))
    yield from _section("Attempts", _attempts(view.status.attempts, now))
    yield from _section("Conditions", _conditions(view, now))


def _headline(view: View, now: datetime) -> Text:
    attempts = len(view.status.attempts)
    allowed = (view.spec.get("recovery") or {}).get("maxAttempts")
    parts = [f"attempt {attempts}" + (f" of {allowed}" if allowed else "")] if attempts and not view.is_over else []
    if view.seconds is not None:
        parts.append(f"after {formatting.duration(view.seconds)}")
    elif view.created:
        parts.append(f"{formatting.duration((now - view.created).total_seconds())} old")
    return Text.assemble(
        (view.name, "bold"),
        (f"  {view.namespace}  ", "dim"),
        (view.phase, f"bold {STYLES[view.state]}"),
        ("  " + " · ".join(parts), "dim"),
    )


def _route(view: View) -> Text:
    """Model, data and output on as many lines as they need."""
    route = [
        ("model ", (view.spec.get("model") or {}).get("source")),
        ("data  ", (view.spec.get("dataset") or {}).get("train")),
        ("output", manifest.with_name((view.spec.get("output") or {}).get("uri"), view.name)),
    ]
    lines = [Text.assemble((f"  {title}  ", "dim"), str(value)) for title, value in route if value]
    return Text("\n").join(lines)


def _progress(view: View, now: datetime, losses: Sequence[float]) -> Iterator[RenderableType]:
    progress = view.status.progress
    if progress is None:
        return
    if progress.total_steps:
        share = progress.step / progress.total_steps
        left = _left(view, now)
        yield Text.assemble(
            ("  " + formatting.bar(share, BAR_WIDTH), STYLES[view.state]),
            (f"  {progress.step:,}/{progress.total_steps:,} steps  {formatting.percent(share)}", "bold"),
            (f"  {left} left" if left else "", ""),
        )
    if len(losses) >= MIN_HISTORY:
        yield _loss_line(losses)
    pairs = [Text.assemble((f"{title} ", "dim"), value, no_wrap=True) for title, value in _numbers(view, now)]
    yield Padding(Columns(pairs, padding=(0, 3, 0, 0)), (0, 0, 0, 2))
    if progress.updated_at and view.state == "running" and (now - progress.updated_at).total_seconds() > 120:
        yield Text(f"  last heard of {formatting.age(progress.updated_at, now)} ago", style="yellow")


def _numbers(view: View, now: datetime) -> Iterator[tuple[str, str]]:
    progress, plan = view.status.progress, view.status.execution_plan
    if progress:
        for title, value in (
            ("loss", progress.loss),
            ("held-out loss", progress.eval_loss),
            ("learning rate", progress.learning_rate),
            ("tokens/s", progress.tokens_per_second),
            ("epoch", progress.epoch),
        ):
            if value is not None:
                yield title, (formatting.loss if title.endswith("loss") else formatting.number)(value)
    if hours := view.gpu_hours(now):
        yield "GPU-hours", formatting.number(hours)
    if cost := formatting.cost(view.status.usage):
        yield "cost of ended attempts", cost
    if plan and plan.micro_batch_size:
        accumulated = f" × {plan.gradient_accumulation_steps}" if plan.gradient_accumulation_steps else ""
        yield "micro-batch", f"{plan.micro_batch_size}{accumulated}"
    if plan and plan.compiled is not None:
        engine = [
            "packed" if plan.packing else "padded",
            "compiled" if plan.compiled else "not compiled",
            *(["CUDA graphs"] if plan.captured else []),
            *([f"{plan.checkpointed_layers} layers recomputed"] if plan.checkpointed_layers else []),
            *(["attention recomputed"] if plan.selective_checkpointing else []),
            *([f"{plan.cached_layers} layers dequantized"] if plan.cached_layers else []),
        ]
        yield "layout", ", ".join(engine)
    if plan and (peak := plan.measured_peak_memory_bytes or plan.predicted_peak_memory_bytes):
        yield ("GPU memory" if plan.measured_peak_memory_bytes else "GPU memory (predicted)"), formatting.size(peak)


def _loss_line(losses: Sequence[float]) -> Text:
    line = formatting.sparkline(losses, SPARK_WIDTH)
    ends = f"  {formatting.loss(losses[0])} → {formatting.loss(losses[-1])}"
    return Text.assemble(("  loss ", "dim"), (line, "cyan"), (ends, "dim"))


def _explanation(view: View) -> Iterator[RenderableType]:
    reason, message = view.explanation
    style = "yellow" if view.is_stalled else STYLES[view.state]
    yield _hanging(reason, message, f"bold {style}")
    if view.cure:
        yield _hanging("Do", view.cure, "bold cyan")


def _hanging(title: str, body: str, style: str) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(f"  {title}:", style=style), Text(body))
    return grid


def _section(title: str, body: Table) -> Iterator[RenderableType]:
    if body.row_count:
        yield Text(f"\n{title}", style="bold")
        yield Padding(body, (0, 0, 0, 2))


def _results(view: View) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    if adapter := view.status.adapter:
        grid.add_row("Adapter", Text(local_path(adapter.uri), style="green"))
        grid.add_row("", Text(f"rank {adapter.rank} for {adapter.base_model}, {formatting.size(adapter.size_bytes)}"))
        grid.add_row("Digest", Text(adapter.manifest_digest, style="dim"))
    if candidate := view.status.candidate:
        grid.add_row("Candidate", Text(f"{local_path(candidate.uri)} (not published)", style="yellow"))
        grid.add_row("Digest", Text(candidate.manifest_digest, style="dim"))
    for check in view.status.gate:
        mark, style = MARKS["True" if check.passed else "False"]
        grid.add_row("Gate", Text.assemble((f"{mark} ", style), check.told))
    for artifact in view.status.artifacts:
        if artifact.uri:
            size = f", {formatting.size(artifact.size_bytes)}" if artifact.size_bytes is not None else ""
            grid.add_row(artifact.name.capitalize(), Text(f"{local_path(artifact.uri)}{size}"))
        else:
            grid.add_row(artifact.name.capitalize(), Text(f"failed: {artifact.message}", style="yellow"))
    if view.is_over:
        for title, value in gains(view.status.metrics or {}):
            grid.add_row(title, value)
        speed = (view.status.metrics or {}).get("tokensPerSecond")
        if speed:
            grid.add_row("Speed", f"{formatting.number(speed)} tokens/s")
        if hours := view.gpu_hours():
            grid.add_row("GPU-hours", formatting.number(hours))
        if cost := formatting.cost(view.status.usage):
            grid.add_row("Cost", Text(cost))
    return grid


def _trials(rows: Sequence[TrialReport]) -> Table:
    """Return the trials of a job of several."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in ("TRIAL", "PHASE", "STEP", "EVAL LOSS", "VALUE", "WHY"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        figures = [formatting.loss(row.eval_loss)] if row.eval_loss is not None else [""]
        figures += [formatting.number(row.value)] if row.value is not None else [""]
        step = "" if row.step is None else f"{row.step:,}"
        table.add_row(one_line(row.name), row.phase, step, *figures, one_line(row.reason or ""))
    return table


def _attempts(attempts: Sequence[Attempt], now: datetime) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    told = any(attempt.gpu for attempt in attempts)
    for title in ("JOB", "ENDED", "EXIT", "LAST STEP", "MICRO-BATCH", "TOOK", *(["GPU"] if told else [])):
        table.add_column(title, no_wrap=True)
    for attempt in attempts:
        ended = attempt.reason or ("running" if attempt.finished_at is None else "")
        style = {"Succeeded": "green", "running": "blue", "Preempted": "yellow"}.get(ended, "red")
        end = attempt.finished_at or now
        table.add_row(
            attempt.job_name,
            Text(ended, style=style),
            "" if attempt.exit_code is None else str(attempt.exit_code),
            "" if attempt.last_step is None else f"{attempt.last_step:,}",
            "" if attempt.micro_batch_size is None else str(attempt.micro_batch_size),
            formatting.duration((end - attempt.started_at).total_seconds()) if attempt.started_at else "",
            *([Text(one_line(attempt.gpu or ""))] if told else []),
        )
    return table


def _conditions(view: View, now: datetime) -> Table:
    grid = Table.grid(padding=(0, 2))
    for width in (1, None, None, None):
        grid.add_column(no_wrap=True, width=width)
    grid.add_column(overflow="fold", style="dim")
    for each in view.status.conditions:
        mark, style = MARKS[each.status]
        is_alarming = each.type in ALARMING and each.reason != OVER
        if each.status == "False" and not is_alarming:
            mark, style = "–", "dim"
        grid.add_row(
            Text(mark, style=style),
            each.type,
            Text(each.reason, style="dim"),
            Text(formatting.age(each.last_transition_time, now), style="dim"),
            # What the page has said above is not said again.
            "" if each.message == view.why else each.message,
        )
    return grid


def change_line(view: View, now: datetime) -> str:
    """One line about a job's state, for a watch that is not on a terminal."""
    progress = view.status.progress
    parts = [now.astimezone(UTC).strftime("%H:%M:%S"), view.phase]
    if progress and progress.summary:
        parts.append(progress.summary)
    if progress and progress.loss is not None:
        parts.append(f"loss {formatting.loss(progress.loss)}")
    if view.why:
        parts.append(one_line(view.why))
    return "  ".join(parts)
