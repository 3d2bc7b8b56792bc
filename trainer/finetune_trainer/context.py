"""What one run carries from step to step: the job, the process, and whom to tell."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Final, ParamSpec, TypeVar

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Adapter, Stage
from finetune_trainer.checkpoints.divergence import Divergence
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.checkpoints.state import TrainingState
from finetune_trainer.errors import Diverged, Outperformed, Preempted
from finetune_trainer.reporting.metrics_log import MetricsLog
from finetune_trainer.reporting.prometheus import Telemetry
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.reporting.start_clock import StartClock
from finetune_trainer.runtime.distributed import all_reduce_any, destroy_process_group, run_on_rank_zero
from finetune_trainer.runtime.signals import StopFlag
from finetune_trainer.settings import Ranks, Settings
from finetune_trainer.sharing import Sharing

P = ParamSpec("P")
T = TypeVar("T")
_BEFORE_TRAINING: Final = "before training began; nothing is lost"


@dataclass(frozen=True)
class RunContext:
    """Made in cli.py, before anything is read.

    Attributes:
        settings: The job, the environment, this process's rank.
        stop: Set when the process is asked to stop.
        report: What /progress, status and the termination message say.
        telemetry: Prometheus metrics.
        metrics: metrics.jsonl and the experiment trackers.
        directory: The run's files on local disk.
        exit_stack: Owns resources that live for the whole run.
        clock: Where the time goes until the first step.
        sharing: What other trials in this process share with this run.
    """

    settings: Settings
    stop: StopFlag
    report: Reporter
    telemetry: Telemetry
    metrics: MetricsLog
    directory: RunDirectory
    exit_stack: ExitStack
    clock: StartClock = field(default_factory=StartClock)
    sharing: Sharing = field(default_factory=Sharing)

    @property
    def spec(self) -> FineTuneJobSpec:
        return self.settings.spec

    @property
    def ranks(self) -> Ranks:
        return self.settings.ranks

    @property
    def stop_reason(self) -> str:
        """By what this process was asked to stop; another rank may have been."""
        return self.stop.reason or "another process"

    def stage(self, stage: Stage, message: str) -> AbstractContextManager[None]:
        """Report what the run does from here on; the time of each stage is a metric."""
        return self.report.stage(stage, message)

    def is_stopping(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self.stop)

    def in_stage(self, stage: Stage, message: str, work: Callable[P, T]) -> Callable[P, T]:
        """Return `work` as a function that runs it in a stage of its own."""

        def run(*args: P.args, **options: P.kwargs) -> T:
            with self.stage(stage, message):
                return work(*args, **options)

        return run

    def goes_on_alone(self) -> bool:
        """Leave the process group; return whether this rank is the one that publishes."""
        destroy_process_group(self.ranks)
        return self.ranks.is_main

    def report_final(self, state: TrainingState) -> None:
        """Report the metrics of the adapter that is published."""
        metrics = state.final_metrics(keep_best=self.spec.evaluation.keep_best)
        self.report.metrics(metrics)
        self.metrics.log_final(state.step, metrics)

    def succeeded(self, adapter: Adapter, message: str) -> Adapter:
        """Report success; return `adapter`."""
        self.report.succeeded(adapter, message)
        return adapter

    def kept_back(self, candidate: Adapter, why: str) -> Adapter:
        """Report an adapter that did not meet publish.onlyIf; return it."""
        self.report.kept_back(candidate, f"Not published: {why}; the adapter is kept at {candidate.uri}")
        return candidate

    def warmed_up(self) -> None:
        """Report that the cache holds what the job needs, as far as there is one."""
        cache = self.settings.environment.cache
        said = f"{cache} holds what this job needs" if cache else "Nothing is kept: FINETUNE_CACHE_DIR names no folder"
        self.report.finished(f"{said}; nothing was trained")

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0; every rank returns its result or raises its error. A collective."""
        return run_on_rank_zero(self.ranks, work)

    def preempted(self, message: str = _BEFORE_TRAINING) -> Preempted:
        """Return the error of a run that was asked to stop."""
        return Preempted(f"Asked to stop ({self.stop_reason}) {message}")

    def stays_stopped(self, state: TrainingState) -> None:
        """Raise Outperformed if an earlier attempt has fallen behind the trials that this run is compared with."""
        if state.outperformed and self.sharing.halves:
            self.report.progress(step=state.step, total_steps=None)
            self.report.metrics(state.metrics)
            raise Outperformed(state.outperformed)

    def stays_diverged(self, found: Divergence | None) -> None:
        """Raise Diverged if an earlier attempt has; those that this run is compared with learn what it had measured."""
        if found is None:
            return
        for step, loss in sorted(found.eval_losses.items()):
            self.metrics.log(step, {"evalLoss": loss})
        raise Diverged(f"{found.message} (so an earlier attempt found: it is not trained again)")

    def stop_if_requested(self, message: str = _BEFORE_TRAINING, alone: bool = False) -> None:
        """Raise Preempted on all ranks if any rank got a stop signal: the others would hang in a collective.

        `alone`: this rank works alone by now.
        """
        (stopping,) = [bool(self.stop)] if alone else all_reduce_any(self.ranks, bool(self.stop))
        if stopping:
            raise self.preempted(message)
