"""Run the trials of a sweep in one process: each a whole run, with its own checkpoints, adapter and report."""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from finetune_api.spec import FineTuneJob
from finetune_api.spec_pack import Halving
from finetune_api.status import Adapter, ExecutionPlan
from finetune_api.uri import parse
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.checkpoints.manager import CheckpointManager
from finetune_trainer.context import RunContext
from finetune_trainer.engine.packed_pass import Share
from finetune_trainer.errors import UNEXPECTED, Failure, Outperformed, Preempted, failure_of
from finetune_trainer.evaluation.lockstep import EvaluationAborted
from finetune_trainer.packing.halving import AtRung, decide
from finetune_trainer.packing.pack import Pack
from finetune_trainer.packing.seat import Seat, Turn
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
        stopped: Why it was stopped early: it fell behind the others. Empty if it was not.
    """

    name: str
    job: FineTuneJob
    reporter: Reporter
    failure: Failure | None = None
    stopped: str = ""

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
        halving: Stops those that fall behind, if given.
        tell_plan: Gets the plan of the passes, whenever it changes.
    """

    trials: Sequence[Trial]
    at_once: int
    environment: Environment
    stop: StopFlag
    folder: Path
    pages: dict[str, Page]
    halving: Halving | None = None
    tell_plan: Callable[[ExecutionPlan], None] = lambda plan: None

    def run(self) -> None:
        """Run all trials to their ends. One that fails takes none along."""
        specs, halves = [trial.job.spec for trial in self.trials], self.halving is not None
        pack = Pack(specs, self.at_once, self.tell_plan, halves)
        queue, going_on = deque(range(len(self.trials))), deque[int]()
        seats, place_of = dict[int, Seat](), dict[int, int]()
        waiting: dict[int, Share | AtRung] = {}
        losses: list[dict[int, float]] = [{} for _ in self.trials]

        def resume(number: int, answer: torch.Tensor | str | BaseException | None = None) -> None:
            request, directory = seats[number].turn.resume(answer), self._directory(self.trials[number])
            if self.halving and (request is None or answer is None):
                losses[number] |= directory.eval_losses()
            if isinstance(request, AtRung):
                losses[number][request.step] = request.value
            if (request is None or (isinstance(request, AtRung) and pack.holds_all)) and number in place_of:
                pack.leave(place_of.pop(number))
            if request is None:
                del seats[number]
                directory.remove_own()  # two dozen of them would fill the disk that the others write to
            else:
                waiting[number] = request

        while seats or (queue and not self.stop):
            # Asked to stop, those that train save at once: no other begins to read its checkpoint before.
            while (going_on or (queue and not self.stop)) and len(place_of) < pack.places:
                place = next(place for place in range(pack.places) if place not in place_of.values())
                if going_on:
                    number = going_on.popleft()
                    place_of[number] = place
                    resume(number, self._seated_again(seats[number], place))
                else:
                    number = queue.popleft()
                    place_of[number] = place
                    seats[number] = self._seat(pack, place, self.trials[number])
                    resume(number)
            if decided := self._decided(waiting, {*seats, *queue}, losses, pack.together):
                for number, told in decided.items():
                    del waiting[number]
                    if told == "" and number not in place_of:
                        going_on.append(number)
                    else:
                        resume(number, told)
                continue
            shares = {place_of[number]: each for number, each in waiting.items() if isinstance(each, Share)}
            if not shares:
                continue
            number_at = {place: number for number, place in place_of.items()}
            for place in shares:
                del waiting[number_at[place]]
            in_order = [share for _, share in sorted(shares.items())]
            for share, answer in zip(in_order, pack.run(in_order), strict=True):
                resume(number_at[share.place], answer)
        for trial in (self.trials[number] for number in queue):
            trial.failure = failure_of(Preempted(f"Asked to stop ({self.stop.reason}) before it began"))
            trial.reporter.failed(trial.failure)

    def _seated_again(self, seat: Seat, place: int) -> str | BaseException:
        """Give `place` to a trial that has waited at a rung; return what it is told there."""
        if self.stop:
            return EvaluationAborted()
        try:
            seat.sit_at(place)
        except Exception as error:
            return error
        return ""

    def _decided(
        self,
        waiting: Mapping[int, Share | AtRung],
        running: Collection[int],
        losses: Sequence[Mapping[int, float]],
        together: int,
    ) -> Mapping[int, str | BaseException]:
        """Return the answers to those that wait at a rung, by their numbers, as far as they are known."""
        asking = {number: each for number, each in waiting.items() if isinstance(each, AtRung)}
        if self.halving is None or not asking:
            return {}
        if self.stop:  # the others leave before they come there
            return {number: EvaluationAborted() for number in asking}
        return decide(asking, losses, running, together, self.halving)

    def _seat(self, pack: Pack, place: int, trial: Trial) -> Seat:
        rungs = self.halving.rungs if self.halving else ()
        turn: Turn = Turns(trial.name, lambda turn: self._run_trial(trial, seat))
        seat = Seat(pack, place, trial.job.spec, turn, rungs, self._pinned_commit)
        return seat

    def _pinned_commit(self) -> str | None:
        """Return the hub's commit of the base on which an earlier attempt trained any of the trials: all share it."""
        if parse(self.trials[0].job.spec.model.source).scheme != "hf":
            return None  # nothing else has commits: no store is read for one
        managers = (CheckpointManager(Settings(each.job, self.environment, Ranks())) for each in self.trials)
        return next((commit for each in managers if (commit := each.pinned_commit())), None)

    def _directory(self, trial: Trial) -> RunDirectory:
        return RunDirectory(self.folder / "trials" / trial.name)

    def _run_trial(self, trial: Trial, seat: Seat) -> None:
        structlog.contextvars.bind_contextvars(trial=trial.name)
        directory, reporter = self._directory(trial), trial.reporter
        try:
            settings, telemetry = Settings(trial.job, self.environment, Ranks()), Telemetry()
            reporter.listen(telemetry.update)
            for path, page in pages_of(reporter, telemetry).items():
                self.pages[f"/trials/{trial.name}{path}"] = page
            with ExitStack() as exit_stack:
                exit_stack.enter_context(logs.copied_to(directory.root / logs.LOG_FILE, of=seat.turn.thread))
                metrics = MetricsLog(directory.metrics_file, telemetry.track)
                ctx = RunContext(settings, self.stop, reporter, telemetry, metrics, directory, exit_stack, sharing=seat)
                run(ctx)
                log.info(reporter.report.message)
        except Outperformed as told:
            trial.stopped = str(told)
            log.info(trial.stopped)
            reporter.outperformed(trial.stopped)
        except BaseException as error:
            trial.failure = failure_of(error)
            message = trial.failure.message
            log.error(message, reason=trial.failure.reason, exc_info=trial.failure.exit_code == UNEXPECTED)
            reporter.failed(trial.failure)
