"""The trials of a sweep on this machine: how far they are, and how they compare in the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from finetune_cli.comparison import reading, runs, table
from finetune_cli.comparison.runs import Run
from finetune_cli.errors import CliError
from finetune_cli.output import console, formatting, run_summary
from finetune_cli.published import published_at

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJob
    from finetune_api.status import TrainerReport
    from finetune_api.sweep import FineTuneSweep

#: Trials that the next command names.
_NAMED: Final = 4


@dataclass
class Trial:
    """One trial, and how far it is. `losses` holds its held-out loss at each rung that it passed."""

    name: str
    summary: str
    values: Mapping[str, Any]
    job: FineTuneJob
    phase: str = "Waiting"
    report: TrainerReport | None = None
    reason: str = ""
    started: float = 0.0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


class Progress:
    """The trials so far: on a terminal a table that is kept up to date, elsewhere a line for each that ends."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        """Show `trials`, in their order."""
        from rich.live import Live

        self._trials = trials
        screen = console.out()
        self._live = Live(console=screen, get_renderable=self._table, transient=True) if screen.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self) -> None:
        """Draw the table anew."""
        if self._live:
            self._live.refresh()

    def ended(self, trial: Trial) -> None:
        """Say how `trial` has ended, where there is no table."""
        self.show()
        if self._live is None:
            number = self._trials.index(trial) + 1
            loss = self._loss(trial)
            said = [trial.phase, *([f"evalLoss {loss}"] if loss else []), f"in {formatting.duration(trial.seconds)}"]
            console.out().print(f"{number}/{len(self._trials)}  {trial.name}  {' '.join(said)}", soft_wrap=True)

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        for title in ("TRIAL", "PHASE", "STEP", "EVAL LOSS", "TIME", "VALUES"):
            grid.add_column(title, no_wrap=True)
        for trial in self._trials:
            running = time.monotonic() - trial.started if trial.phase == "Running" else trial.seconds
            stage = trial.report.stage if trial.report and trial.phase == "Running" else trial.phase
            grid.add_row(
                Text(trial.name, style="bold"),
                stage,
                trial.report.progress.summary if trial.report else "",
                self._loss(trial),
                formatting.duration(running) if running else "",
                Text(trial.summary),
            )
        return grid

    @staticmethod
    def _loss(trial: Trial) -> str:
        if trial.report is None:
            return ""
        loss = trial.report.metrics.get("evalLoss", trial.report.progress.eval_loss)
        return "" if loss is None else formatting.loss(loss)


def summary(sweep: FineTuneSweep, trials: Sequence[Trial]) -> None:
    """Print how the trials compare, the best first, and what to do next."""
    objective = sweep.spec.objective
    order = reading.Sweep(sweep.metadata.name, objective.metric, objective.minimizes)
    found = reading.ordered(order, [run_of(trial) for trial in trials])
    console.out().print()
    console.page(table.table(found), console.PIPED_TABLE_WIDTH)
    best = found[0]
    if objective.metric in best.metrics and best.phase == "Succeeded":
        console.out().print()
        console.done(f"{best.name} is best: {table.shown_value(objective.metric, best.metrics[objective.metric])}")
    places = [_place(run.uri) for run in found if run.phase == "Succeeded" and not run.uri.startswith("pvc://")]
    if places:
        some = " ".join(places[:_NAMED])
        compared = [f"finetune compare {some} --html report.html"] if len(places) > 1 else []
        console.next_commands(*compared, f"finetune chat {places[0]}")


def _place(address: str) -> str:
    """Return an adapter's address as it is typed from here."""
    path = run_summary.local_path(address)
    here = f"{Path.cwd()}/"
    return f"./{path.removeprefix(here)}" if path.startswith(here) else path


def run_of(trial: Trial) -> Run:
    """Return a trial as it is compared: by what it published, or else by what its trainer said last."""
    if trial.phase == "Succeeded":
        try:
            place = published_at(trial.job.spec.output.uri, adapters_only=True)
            return reading.read_published(place, trial.name)
        except CliError:
            pass  # out of reach by now, or a volume: the trainer's last words are as good
    metrics = runs.finite(trial.report.metrics) if trial.report and trial.phase == "Succeeded" else {}
    spec = trial.job.spec.manifest()
    return Run(trial.name, trial.job.spec.output.uri, trial.phase, runs.values_of(spec), metrics, None)
