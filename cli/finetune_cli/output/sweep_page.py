"""The pages of sweeps in `finetune list` and `status`: objects in, Rich renderables out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune_api.plain_text import one_line, plain_values
from finetune_api.sweep_status import FineTuneSweepStatus, TrialStatus
from finetune_api.sweep_trials import job_name
from finetune_cli.output import formatting
from finetune_cli.output.job_view import View

STYLES = {"Succeeded": "green", "Failed": "red", "Suspended": "yellow", "Pending": "yellow", "Stopped": "dim"}


@dataclass(frozen=True)
class SweepView:
    """What the pages show of one sweep. `status` is empty for one the operator has not seen yet."""

    name: str
    namespace: str
    created: datetime | None
    metric: str
    status: FineTuneSweepStatus
    unseen: str = ""
    """Why no operator has seen it, as far as that was asked."""

    @classmethod
    def of(cls, sweep: dict[str, Any], unseen: str = "") -> SweepView:
        """Read a sweep; a status of another version that cannot be read counts as empty."""
        from pydantic import ValidationError

        sweep = plain_values(sweep)
        metadata, objective = sweep.get("metadata") or {}, (sweep.get("spec") or {}).get("objective")
        try:
            status = FineTuneSweepStatus.model_validate(sweep.get("status") or {})
        except ValidationError:
            status = FineTuneSweepStatus()
        created = metadata.get("creationTimestamp")
        return cls(
            name=str(metadata.get("name", "")),
            namespace=str(metadata.get("namespace", "")),
            created=datetime.fromisoformat(created) if created else None,
            metric=str(objective.get("metric", "")) if isinstance(objective, dict) else "",
            status=status,
            unseen=unseen,
        )

    @property
    def is_over(self) -> bool:
        """Whether the sweep has ended, well or not."""
        return self._succeeded not in (None, "Unknown")

    @property
    def has_failed(self) -> bool:
        """Whether the sweep has ended without an adapter, or before its trials did."""
        return self._succeeded == "False"

    @property
    def _succeeded(self) -> str | None:
        return next((each.status for each in self.status.conditions if each.type == "Succeeded"), None)

    @property
    def phase(self) -> str:
        """The operator's word for it."""
        return self.status.phase or "Pending"

    @property
    def why(self) -> str:
        """How far it is, why it waits, or how it ended."""
        if not self.status.conditions:
            return "The operator has not seen this sweep yet" + (f": {self.unseen}" if self.unseen else "")
        return next((each.message for each in self.status.conditions if each.type == "Succeeded"), "")


def sweep_line(view: SweepView, now: datetime) -> str:
    """Return one line about a sweep's state, for a watch that is not on a terminal."""
    parts = [now.astimezone(UTC).strftime("%H:%M:%S"), view.phase]
    if view.status.summary:
        parts.append(f"{view.status.summary} trials")
    if best := view.status.best:
        parts.append(f"best {best.trial} {formatting.number(best.value)}")
    return "  ".join([*parts, one_line(view.why)]).rstrip()


def sweep_table(views: Sequence[SweepView], now: datetime, *, namespaces: bool) -> Table:
    """Return the table of `finetune list --sweeps`."""
    titles = [*(["NAMESPACE"] if namespaces else []), "NAME", "PHASE", "TRIALS", "BEST", "VALUE", "AGE"]
    table = _table(*titles)
    table.add_column("WHY / ADAPTER")
    for view in views:
        best = view.status.best
        table.add_row(
            *([view.namespace] if namespaces else []),
            Text(view.name, style="bold"),
            _phase(view.phase),
            view.status.summary,
            best.trial if best else "",
            formatting.number(best.value) if best else "",
            formatting.age(view.created, now),
            Text(one_line((best.uri if best and best.uri else view.why) or ""), no_wrap=True, overflow="ellipsis"),
        )
    return table


def sweep_page(view: SweepView, jobs: Sequence[dict[str, Any]], now: datetime) -> RenderableType:
    """Return the page of `finetune status --sweep`. `jobs` are the FineTuneJobs of its trials."""
    return Group(*_blocks(view, {each.name: each for each in map(View.of, jobs)}, now))


def _blocks(view: SweepView, jobs: dict[str, View], now: datetime) -> Iterator[RenderableType]:
    yield Text.assemble(
        (view.name, "bold"),
        (f"  {view.namespace}  ", "dim"),
        _phase(view.phase),
        ("  " + (f"{view.status.summary} trials · " if view.status.summary else ""), "dim"),
        (f"{formatting.age(view.created, now)} old", "dim"),
    )
    if view.why:
        yield Text(f"  {one_line(view.why)}")
    if best := view.status.best:
        yield Text.assemble(
            "  best    ", (best.trial, "bold green"), f"  {view.metric} {formatting.number(best.value)}"
        )
        yield Text(f"  adapter {one_line(best.uri or '')}")
    if hours := sum(job.gpu_hours(now) or 0.0 for job in jobs.values()):
        yield Text(f"  used    {formatting.number(hours)} GPU-hours")
    if cost := formatting.cost(*(job.status.usage for job in jobs.values())):
        yield Text(f"  cost    {cost}")
    if not view.status.trials:
        return
    yield Text()
    shared = any(row.job_name for row in view.status.trials)
    columns = ("TRIAL", "PHASE", "STEP", "EVAL LOSS", view.metric or "VALUE", "VALUES", *(["JOB"] if shared else []))
    table = _table(*columns, "WHY")
    for row in view.status.trials:
        name = row.job_name or job_name(view.name, row.name)
        cells = _row(row, jobs.get(name), is_best=bool(best and best.trial == row.name))
        table.add_row(*cells, *([name] if shared else []), row.reason or "")
    yield table
    if waiting := view.status.counts.waiting:
        yield Text(f"… and {waiting} that have not started", style="dim")


def _row(row: TrialStatus, job: View | None, *, is_best: bool) -> list[str | Text]:
    step, loss = _progress(row, job)
    return [
        Text(row.name, style="bold green" if is_best else ""),
        _phase(row.phase),
        step,
        formatting.loss(loss) if loss is not None else "",
        formatting.number(row.value) if row.value is not None else "",
        one_line(row.values),
    ]


def _progress(row: TrialStatus, job: View | None) -> tuple[str, float | None]:
    """Return how far a trial is, and its held-out loss: as its job tells, or its row in a job of several."""
    if job is None:
        return "", None
    if row.job_name:
        told = next((each for each in job.status.trials if each.name == row.name), None)
        return (str(told.step) if told and told.step else ""), told.eval_loss if told else None
    progress = job.status.progress
    return (progress.summary, progress.eval_loss) if progress else ("", None)


def _phase(phase: str) -> Text:
    return Text(phase, style=STYLES.get(phase, "blue"))


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table
