"""A FineTuneSweep in one process: `finetune-trainer --config sweep.yaml`, and `finetune run` on a sweep."""

import json
import math
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from finetune_api.exit_codes import OUTPERFORMED, ExitCode
from finetune_api.spec import FineTuneJob
from finetune_api.status import TrainerReport
from finetune_api.sweep import FineTuneSweep
from finetune_api.sweep_packing import trial_log, why_not_packed
from finetune_trainer.errors import ConfigInvalid, Failure, Preempted, TrainerError
from finetune_trainer.reporting.http import Page
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.reporting.setup import show
from finetune_trainer.runtime.signals import StopFlag
from finetune_trainer.runtime.workspace import work_folder
from finetune_trainer.settings import Environment, Ranks, Settings


class NoTrialSucceeded(TrainerError):
    """No trial has published its adapter; the exit code is that of the first."""

    def __init__(self, name: str, failure: Failure) -> None:
        self.exit_code, self.reason = failure.exit_code, failure.reason  # type: ignore[misc, assignment]
        super().__init__(f"No trial has published an adapter; {name}: {failure.message}")


def run_sweep(
    sweep: FineTuneSweep,
    jobs: dict[str, FineTuneJob],
    environment: Environment,
    ranks: Ranks,
    stop: StopFlag,
    reporter: Reporter,
    console: Console | None,
    exit_stack: ExitStack,
) -> None:
    """Run all trials of `sweep`, several at the same time, and report the best one.

    Args:
        sweep: The sweep.
        jobs: The FineTuneJob of each trial, by the trial's name, in the order of their start.
        environment: This process's.
        ranks: This process must be alone.
        stop: Set when the process is asked to stop.
        reporter: Of the sweep as a whole.
        console: The terminal, if there is one.
        exit_stack: Owns what lasts as long as the process.

    Raises:
        ConfigInvalid: The trials cannot share a process.
        Preempted, NoTrialSucceeded: See `conclude`.
    """
    if ranks.size > 1:
        raise ConfigInvalid("A sweep runs in one process: under torchrun, run its trials one by one")
    if why := why_not_packed(sweep.spec, [(name, job.spec) for name, job in jobs.items()]):
        raise ConfigInvalid(f"The trials of {sweep.metadata.name} cannot share one process: {why}")
    settings = Settings(next(iter(jobs.values())), environment, ranks)
    folder: Path = exit_stack.enter_context(work_folder(settings))
    pages: dict[str, Page] = {}
    show(exit_stack, settings, reporter, console, pages)

    from finetune_trainer.packing.trials import Trial, TrialRunner  # imports torch

    log = environment.termination_log
    trials = [Trial(name, with_uid(job), Reporter(trial_log(log, name))) for name, job in jobs.items()]
    with reporter.stage("Training", f"Training {len(trials)} trials in one process"):
        halving = sweep.spec.early_stopping
        TrialRunner(trials, sweep.spec.parallelism, environment, stop, folder, pages, halving).run()
    conclude(sweep, [(trial.name, trial.reporter.report, trial.failure) for trial in trials], reporter)


def with_uid(job: FineTuneJob) -> FineTuneJob:
    """Return `job` with an identity that follows from its spec, so that a later process knows what it has published.

    Not with output.overwrite: then it is to be trained anew.
    """
    if job.spec.output.overwrite:
        return job
    identity = json.dumps([job.metadata.name, job.spec.manifest()], sort_keys=True)
    uid = str(uuid.uuid5(uuid.NAMESPACE_URL, identity))
    return job.model_copy(update={"metadata": job.metadata.model_copy(update={"uid": uid})})


def conclude(
    sweep: FineTuneSweep, trials: Sequence[tuple[str, TrainerReport, Failure | None]], reporter: Reporter
) -> None:
    """Report how the trials ended: name, last report, and why each failed that did.

    Raises:
        Preempted: One of them was stopped, and goes on where it stopped.
        NoTrialSucceeded: None has published its adapter.
    """
    published = [(name, report, report.adapter) for name, report, _ in trials if report.adapter]
    failures = [(name, failure) for name, _, failure in trials if failure]
    told = f"{len(published)} of {len(trials)} adapters are published"
    for name, failure in failures:
        if failure.exit_code == ExitCode.PREEMPTED:
            raise Preempted(f"{told}; trial {name}: {failure.message}")
    if stopped := [name for name, report, _ in trials if report.reason == OUTPERFORMED]:
        told += f", {len(stopped)} {'trial was' if len(stopped) == 1 else 'trials were'} stopped early"
    for name, report, why in trials:
        if why is None and not report.adapter and name not in stopped:  # publish.onlyIf
            told += f"; {name}: {report.message}"
    if not published and failures:
        raise NoTrialSucceeded(*failures[0])
    if not published:
        reporter.finished(told)
        return
    metric, sign = sweep.spec.objective.metric, 1 if sweep.spec.objective.minimizes else -1
    name, report, adapter = min(published, key=lambda each: sign * each[1].metrics.get(metric, sign * math.inf))
    if metric in report.metrics:
        told += f"; the best is {name}, {metric} {report.metrics[metric]:.4g}"
    for other, failure in failures:
        told += f"; {other} failed: {failure.message}"
    reporter.metrics(report.metrics)
    reporter.succeeded(adapter, told)
