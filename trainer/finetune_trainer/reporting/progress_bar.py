"""The live progress bar of a run on a terminal."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from finetune_api.status import TrainerReport
from finetune_trainer.reporting.report import Reporter

#: Columns of the terminal below which the bar and the loss, or speed and elapsed time, are left out.
_NARROW, _WIDE = 60, 100


@contextmanager
def live_progress(console: Console, reporter: Reporter) -> Iterator[None]:
    """Show step, loss, tokens/s and the time left while the block runs, as far as the terminal is wide."""
    bar = Progress(*_columns(console.width), console=console, transient=True)
    task = bar.add_task("Starting", total=None, step="", numbers="")

    def show(report: TrainerReport) -> None:
        progress = report.progress
        bar.update(
            task,
            description=re.sub(r"(?<=[a-z])(?=[A-Z])", " ", report.stage).capitalize(),
            completed=progress.step,
            total=progress.total_steps,
            step=f"step {progress.summary}" if progress.summary else "",
            numbers="  ".join(_numbers(report, console.width)),
        )

    reporter.listen(show)
    with bar:
        yield


class _TimeLeft(TimeRemainingColumn):
    """The time left, once it is known."""

    def render(self, task: Task) -> Text:
        """Return nothing before the first steps, and when nothing is left."""
        return Text.assemble("ETA ", super().render(task)) if task.time_remaining else Text("")


def _columns(width: int) -> Iterator[ProgressColumn]:
    """Yield what fits: the time left is the last to go."""
    yield TextColumn("[bold]{task.description}")
    if width >= _NARROW:
        yield BarColumn(bar_width=None)
    yield TextColumn("{task.fields[step]}")
    if width >= _NARROW:
        yield TextColumn("{task.fields[numbers]}")
    if width >= _WIDE:
        yield TimeElapsedColumn()
    yield _TimeLeft(compact=True)


def _numbers(report: TrainerReport, width: int) -> Iterator[str]:
    progress = report.progress
    if progress.loss is not None:
        yield f"loss {progress.loss:.4f}"
    if width < _WIDE:
        return
    if progress.eval_loss is not None:
        yield f"eval {progress.eval_loss:.4f}"
    if progress.tokens_per_second is not None:
        yield f"{progress.tokens_per_second:,.0f} tokens/s"
