"""A FineTuneSweep in one process: `finetune-trainer --config sweep.yaml`, and `finetune run` on a sweep."""

import json
import math
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from finetune_api import exit_codes
from finetune_api.exit_codes import OUTPERFORMED, ExitCode
from finetune_api.packed_jobs import trial_uid
from finetune_api.spec import FineTuneJob
from finetune_api.status import Adapter, TrainerReport
from finetune_api.sweep import FineTuneSweep
from finetune_api.sweep_packing import trial_log, why_not_packed
from finetune_trainer.errors import ConfigInvalid, Failure, NotPackable, TrainerError
from finetune_trainer.reporting.http import Page
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.reporting.setup import show
from finetune_trainer.runtime.environment import set_compile_cache
from finetune_trainer.runtime.signals import StopFlag
from finetune_trainer.runtime.workspace import work_folder
from finetune_trainer.settings import Environment, Ranks, Settings

#: Rank of a failure that another attempt would meet again.
_FINAL = 2


class TrialFailed(TrainerError):
    """The process ends as one of its trials did."""

    def __init__(self, told: str, name: str, failure: Failure) -> None:
        self.exit_code, self.reason = failure.exit_code, failure.reason  # type: ignore[misc, assignment]
        super().__init__(f"{told}; trial {name}: {failure.message}")


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
        NotPackable: The trials cannot share a process.
        TrialFailed: See `conclude`.
    """
    if ranks.size > 1:
        raise ConfigInvalid("A sweep runs in one process: under torchrun, run its trials one by one")
    if why := why_not_packed([(name, job.spec) for name, job in jobs.items()]):
        raise NotPackable(f"The trials of {sweep.metadata.name} cannot share one process: {why}")
    settings = Settings(next(iter(jobs.values())), environment, ranks)
    folder: Path = exit_stack.enter_context(work_folder(settings))
    set_compile_cache(environment.compile_cache)
    pages: dict[str, Page] = {}
    show(exit_stack, settings, reporter, console, pages)

    from finetune_trainer.packing.table import TrialTable
    from finetune_trainer.packing.trials import Trial, TrialRunner  # imports torch

    log = environment.termination_log
    trials = [
        # In a pod each trial's row in the process's own report says it: there is no other file that anybody reads.
        Trial(name, with_uid(job, name, sweep), Reporter(None if sweep.metadata.uid else trial_log(log, name)))
        for name, job in jobs.items()
    ]
    table = TrialTable(trials, sweep.spec.objective.metric, reporter)
    with reporter.stage("CheckingData", f"Training {len(trials)} trials in one process"):
        table.watch()
        halving = sweep.spec.early_stopping
        TrialRunner(trials, sweep.spec.parallelism, environment, stop, folder, pages, halving, reporter.plan).run()
    conclude(sweep, [(trial.name, trial.reporter.report, trial.failure) for trial in trials], reporter)


def with_uid(job: FineTuneJob, trial: str, sweep: FineTuneSweep) -> FineTuneJob:
    """Return the job of `trial` with an identity, so that a later process knows what it has published.

    In a pod it follows from that of the FineTuneJob, elsewhere from the spec: there is none with output.overwrite, for
    then it is to be trained anew.
    """
    if owner := sweep.metadata.uid:
        uid = trial_uid(owner, sweep.metadata.name, trial)
    elif job.spec.output.overwrite:
        return job
    else:
        identity = json.dumps([job.metadata.name, job.spec.manifest()], sort_keys=True)
        uid = str(uuid.uuid5(uuid.NAMESPACE_URL, identity))
    return job.model_copy(update={"metadata": job.metadata.model_copy(update={"uid": uid})})


def conclude(
    sweep: FineTuneSweep, trials: Sequence[tuple[str, TrainerReport, Failure | None]], reporter: Reporter
) -> None:
    """Report how the trials ended: name, last report, and why each failed that did.

    Raises:
        TrialFailed: One of them was stopped or may do better in another attempt, in which the others keep what they
            have; or all have failed.
    """
    published = [(name, report, report.adapter) for name, report, _ in trials if report.adapter]
    failures = sorted(((name, failure) for name, _, failure in trials if failure), key=lambda each: _rank(each[1]))
    told = f"{len(published)} of {len(trials)} adapters are published"
    if failures and (not published or _rank(failures[0][1]) < _FINAL):
        raise TrialFailed(told, *failures[0])
    if stopped := [name for name, report, _ in trials if report.reason == OUTPERFORMED]:
        told += f", {len(stopped)} {'trial was' if len(stopped) == 1 else 'trials were'} stopped early"
    for name, report, why in trials:
        if why is None and not report.adapter and name not in stopped:  # publish.onlyIf
            told += f"; {name}: {report.message}"
    metric, sign = sweep.spec.objective.metric, 1 if sweep.spec.objective.minimizes else -1
    if not published:
        _kept_back([(report, report.candidate) for _, report, _ in trials if report.candidate], told, reporter)
        return
    name, report, adapter = min(published, key=lambda each: sign * each[1].metrics.get(metric, sign * math.inf))
    if metric in report.metrics:
        told += f"; the best is {name}, {metric} {report.metrics[metric]:.4g}"
    for other, failure in failures:
        told += f"; {other} failed: {failure.message}"
    reporter.metrics(report.metrics)
    reporter.succeeded(adapter, told)


def _rank(failure: Failure) -> int:
    """Return what of several failures the process ends with, the least first: whatever another attempt could mend."""
    if failure.exit_code == ExitCode.PREEMPTED:
        return 0
    outcome = exit_codes.outcome_of(failure.exit_code, failure.reason)
    return _FINAL if outcome and outcome.final else 1


def _kept_back(found: Sequence[tuple[TrainerReport, Adapter]], told: str, reporter: Reporter) -> None:
    """Report trials of which none met publish.onlyIf."""
    if not found:
        reporter.finished(told)
        return
    report, candidate = found[0]
    reporter.metrics(report.metrics)
    reporter.gate(report.gate)
    reporter.kept_back(candidate, told)
