"""Run the trials of a sweep in one process: each a whole run, with its own checkpoints, adapter and report."""

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from finetune_api.spec import FineTuneJob
from finetune_api.status import Adapter
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.context import RunContext
from finetune_trainer.engine.packed_pass import Share
from finetune_trainer.errors import Failure, failure_of
from finetune_trainer.packing.pack import Pack, Seat, Turn
from finetune_trainer.packing.turns import Turns
from finetune_trainer.reporting import logs
from finetune_trainer.reporting.http import Page
from finetune_trainer.reporting.metrics_log import MetricsLog
from finetune_trainer.reporting.prometheus import Telemetry
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.reporting.setup import pages_of
from finetune_trainer.run import run
from finetune_trainer.runtime.signals import StopFlag
from finetune_trainer.settings import Environment, Ranks, Settings

log = structlog.get_logger(__name__)


@dataclass
class Trial:
    """One trial, and how it ended.

    Attributes:
        name: Its name in the sweep.
        job: Its FineTuneJob.
        reporter: What is told of it.
        failure: Why it failed; None if it did not, or runs.
    """

    name: str
    job: FineTuneJob
    reporter: Reporter
    failure: Failure | None = None

    @property
    def adapter(self) -> Adapter | None:
        return self.reporter.report.adapter


@dataclass
class TrialRunner:
    """Runs trials, as many at the same time as a pass has places for; one that ends gives its place to the next.

    Attributes:
        trials: In the order of their start.
        at_once: How many may train at the same time.
        environment: The process's.
        stop: Set when the process is asked to stop.
        folder: The process's scratch folder, with one for each trial.
        pages: What the process serves; each trial adds its own.
    """

    trials: Sequence[Trial]
    at_once: int
    environment: Environment
    stop: StopFlag
    folder: Path
    pages: dict[str, Page]

    def run(self) -> None:
        """Run all trials to their ends. One that fails takes none along."""
        pack = Pack([trial.job.spec for trial in self.trials], self.at_once)
        queue, seated = deque(self.trials), dict[int, Turn]()
        waiting: dict[int, Share] = {}

        def resume(place: int, answer: torch.Tensor | BaseException | None = None) -> None:
            request = seated[place].resume(answer)
            if request is None:
                pack.leave(place)
                del seated[place]
            else:
                waiting[place] = request

        while queue or seated:
            while queue and len(seated) < pack.places:
                place = next(place for place in range(pack.places) if place not in seated)
                seated[place] = self._turn(pack, place, queue.popleft())
                resume(place)
            if not seated:
                continue
            shares = [waiting[place] for place in sorted(waiting)]
            waiting.clear()
            answers: Sequence[torch.Tensor | BaseException]
            try:
                answers = pack.run(shares)
            except Exception as error:
                answers = [copy_of(error) for _ in shares]
            for share, answer in zip(shares, answers, strict=True):
                resume(share.place, answer)

    def _turn(self, pack: Pack, place: int, trial: Trial) -> Turn:
        return Turns(trial.name, lambda turn: self._run_trial(trial, Seat(pack, place, trial.job.spec, turn)))

    def _run_trial(self, trial: Trial, seat: Seat) -> None:
        structlog.contextvars.bind_contextvars(trial=trial.name)
        settings = Settings(trial.job, self.environment, Ranks())
        directory = RunDirectory(self.folder / "trials" / trial.name)
        telemetry, reporter = Telemetry(), trial.reporter
        reporter.listen(telemetry.update)
        for path, page in pages_of(reporter, telemetry).items():
            self.pages[f"/trials/{trial.name}{path}"] = page
        try:
            with ExitStack() as exit_stack:
                exit_stack.enter_context(logs.copied_to(directory.root / logs.LOG_FILE, of=seat.turn.thread))
                metrics = MetricsLog(directory.metrics_file, telemetry.track)
                ctx = RunContext(settings, self.stop, reporter, telemetry, metrics, directory, exit_stack, sharing=seat)
                run(ctx)
                log.info(reporter.report.message)
        except BaseException as error:
            trial.failure = failure_of(error)
            message = trial.failure.message
            log.error(message, reason=trial.failure.reason, exc_info=trial.failure.exit_code == 1)
            reporter.failed(trial.failure)


def copy_of(error: BaseException) -> BaseException:
    """Return an error for one of several threads that raise it: each adds its own traceback."""
    try:
        found = type(error)(*error.args)
    except Exception:
        found = RuntimeError(str(error))
    found.__cause__ = error
    return found
