"""What the process says of its trials: a row of each, and the progress of all together."""

import math
from collections.abc import Sequence

from finetune_api import exit_codes
from finetune_api.exit_codes import ExitCode
from finetune_api.spec_pack import MAX_PACK
from finetune_api.status import Progress, Stage, TrainerReport
from finetune_api.trial_report import TrialReport
from finetune_trainer.errors import Failure
from finetune_trainer.packing.trials import Trial
from finetune_trainer.reporting.report import Reporter


class TrialTable:
    """Keeps the report of the whole process up to date."""

    def __init__(self, trials: Sequence[Trial], metric: str, reporter: Reporter) -> None:
        """`metric` is the objective's."""
        self._trials, self._metric, self._reporter = trials, metric, reporter

    def watch(self) -> None:
        """Follow the trials from now on."""
        for trial in self._trials:
            trial.reporter.listen(lambda report: self._tell())
        self._tell()

    def _tell(self) -> None:
        reports = [trial.reporter.report for trial in self._trials]
        if len(reports) <= MAX_PACK:  # only what runs on this machine has more
            rows = [row(each.name, each.reporter.report, each.failure, self._metric) for each in self._trials]
            self._reporter.trials(rows)
        self._take_over(reports)
        progress = [report.progress for report in reports]
        self._reporter.progress(
            step=sum(each.step for each in progress),
            total_steps=total_steps(progress),
            tokens_per_second=sum(
                report.progress.tokens_per_second or 0.0 for report in reports if report.stage == "Training"
            ),
        )

    def _take_over(self, reports: Sequence[TrainerReport]) -> None:
        """Report what holds for the whole process: its GPU, and what it does."""
        known = self._reporter.report
        if known.gpu is None and (gpu := next((each.gpu for each in reports if each.gpu), None)):
            self._reporter.gpu(gpu)
        self._reporter.at_stage(stage_of(reports, known.stage))


#: What a process of several trials is said to do: of all that they do, the first of these.
_STAGES: tuple[Stage, ...] = ("Training", "Evaluating", "Verifying", "Publishing", "LoadingModel", "CheckingData")


def stage_of(reports: Sequence[TrainerReport], known: Stage) -> Stage:
    """Return what the process does; what it was known to do where no trial has begun, or all have ended."""
    doing = {report.stage for report in reports}
    return next((stage for stage in _STAGES if stage in doing), known)


def row(name: str, report: TrainerReport, failure: Failure | None, metric: str) -> TrialReport:
    """Return what to say of one trial: its last report, and why it failed if it did."""
    found = TrialReport(name=name, step=report.progress.step or None, eval_loss=_finite(report.progress.eval_loss))
    if failure is not None and failure.exit_code == ExitCode.PREEMPTED:
        return found.model_copy(update={"phase": "Running"})
    if failure is not None:
        return found.model_copy(update={"phase": "Failed", "reason": failure.reason})
    if report.adapter:
        return found.model_copy(update={"phase": "Succeeded", "value": _finite(report.metrics.get(metric))})
    if report.reason == exit_codes.OUTPERFORMED:
        return found.model_copy(update={"phase": "Stopped", "reason": report.reason})
    if report.candidate:
        return found.model_copy(update={"phase": "Failed", "reason": exit_codes.GATE_NOT_PASSED})
    return found if report.stage == "Starting" else found.model_copy(update={"phase": "Running"})


def total_steps(progress: Sequence[Progress]) -> int | None:
    """Return the steps of all trials; those that have not begun count as the longest of the others."""
    known = [each.total_steps for each in progress if each.total_steps]
    return sum(known) + max(known) * (len(progress) - len(known)) if known else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
