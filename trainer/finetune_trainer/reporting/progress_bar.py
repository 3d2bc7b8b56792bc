"""The live progress bar of a run on a terminal."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from finetune_api.status import TrainerReport
from finetune_trainer.reporting.report import Reporter


@contextmanager
def live_progress(console: Console, reporter: Reporter) -> Iterator[None]:
    """Show step, loss, tokens/s and the time left while the block runs."""
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[step]}  {task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )
    task = bar.add_task("Starting", total=None, step="", numbers="")

    def show(report: TrainerReport) -> None:
        progress = report.progress
        bar.update(
            task,
            description=re.sub(r"(?<=[a-z])(?=[A-Z])", " ", report.stage).capitalize(),
            completed=progress.step,
            total=progress.total_steps,
            step=f"step {progress.summary}" if progress.summary else "",
            numbers="  ".join(_numbers(report)),
        )

    reporter.listen(show)
    with bar:
        yield


def _numbers(report: TrainerReport) -> Iterator[str]:
    progress = report.progress
    if progress.loss is not None:
        yield f"loss {progress.loss:.4f}"
    if progress.eval_loss is not None:
        yield f"eval {progress.eval_loss:.4f}"
    if progress.tokens_per_second is not None:
        yield f"{progress.tokens_per_second:,.0f} tokens/s"
