"""The TrainerReport: current for /progress and Prometheus, at the end written as the pod's termination message."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog

from finetune_api import constants, exit_codes
from finetune_api.gate import GateCheck
from finetune_api.status import Adapter, Artifact, ExecutionPlan, Progress, Resumption, Stage, TrainerReport
from finetune_api.trial_report import TrialReport
from finetune_trainer.errors import UNEXPECTED_REASON, Failure
from finetune_trainer.stores.json_numbers import drop_non_finite

log = structlog.get_logger(__name__)
_PREEMPTED = exit_codes.OUTCOMES[exit_codes.ExitCode.PREEMPTED].reason
#: Bytes that a message keeps, if it is too long for the termination log, before metrics are dropped instead.
_LEAST_MESSAGE_BYTES = 256
#: What the kubelet takes of one container: with two more beside the trainer all of it.
MAX_WITH_TRIALS = 4096
_FIRST = ("adapter", "candidate", "stage", "reason", "trials", "message", "gate", "resumedFrom", "artifacts")
_TOLD_BEFORE = ("learning_rate", "tokens_per_second", "estimated_completion_time", "updated_at")
_PLAN = ("micro_batch_size", "gradient_accumulation_steps", "predicted_peak_memory_bytes", "measured_peak_memory_bytes")
Listener = Callable[[TrainerReport], None]


class Reporter:
    """Thread-safe holder of the current TrainerReport; tells listeners (console, Prometheus) of every change."""

    def __init__(self, termination_log: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._report = TrainerReport()
        self._listeners: list[Listener] = []
        self._termination_log = termination_log

    @property
    def report(self) -> TrainerReport:
        with self._lock:
            return self._report

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    @contextmanager
    def stage(self, stage: Stage, message: str) -> Iterator[None]:
        """Report that the run is in `stage` from here on; listeners time it (Prometheus, by stage).

        The stage stands until the next begins: it never goes back.
        """
        log.info(message, stage=stage)
        self._change(stage=stage, message=message)
        yield

    def at_stage(self, stage: Stage) -> None:
        """Report that a process of several trials is in `stage`, which may go back."""
        self._change(stage=stage)

    def resumed_from(self, checkpoint: Resumption | None) -> None:
        self._change(resumed_from=checkpoint)

    def gpu(self, name: str) -> None:
        """Report the name of the GPU as node labels have it, with dashes for spaces; an empty one says nothing."""
        self._change(gpu="-".join(name.split())[:63] or None)

    def plan(self, plan: ExecutionPlan) -> None:
        self._change(execution_plan=plan)

    def metrics(self, values: dict[str, float]) -> None:
        """Add or replace latest metric values; those that are NaN or infinite are left out."""
        self._change(metrics=self.report.metrics | drop_non_finite(values))

    def progress(
        self, *, step: int, total_steps: int | None, seconds_per_step: float | None = None, **values: Any
    ) -> None:
        """Record how far training is. `values` are further Progress fields; None and NaN leave what was there."""
        known = self.report.progress.model_dump() | drop_non_finite(values)
        now = datetime.now(UTC)
        if total_steps:
            known |= {"summary": f"{step}/{total_steps}", "percent": round(min(100.0, 100 * step / total_steps), 2)}
            if seconds_per_step is not None:
                left = timedelta(seconds=seconds_per_step * max(0, total_steps - step))
                known["estimated_completion_time"] = now + left
        known |= {"step": step, "total_steps": total_steps, "updated_at": now}
        self._change(progress=Progress.model_validate(known))

    def trials(self, rows: Sequence[TrialReport]) -> None:
        """Report where each trial of the process stands."""
        self._change(trials=list(rows))

    def artifact(self, artifact: Artifact) -> None:
        """Add what was made of the adapter besides."""
        self._change(artifacts=[*self.report.artifacts, artifact])

    def succeeded(self, adapter: Adapter, message: str) -> None:
        self._change(stage="Succeeded", reason="Succeeded", message=message, adapter=adapter)
        self._write_termination_message()

    def gate(self, checks: Sequence[GateCheck]) -> None:
        """Report what became of publish.onlyIf."""
        self._change(gate=list(checks))

    def kept_back(self, candidate: Adapter, message: str) -> None:
        self._change(stage="Succeeded", reason=exit_codes.GATE_NOT_PASSED, message=message, candidate=candidate)
        self._write_termination_message()

    def outperformed(self, message: str) -> None:
        """Report the end of a trial that its sweep has stopped early."""
        self._change(stage="Succeeded", reason=exit_codes.OUTPERFORMED, message=message)
        self._write_termination_message()

    def finished(self, message: str) -> None:
        """Report the end of a run that makes no adapter."""
        self._change(message=message)
        self._write_termination_message()

    def failed(self, failure: Failure) -> None:
        """Report `failure`. Keep the termination message if another process of the pod has written the cause."""
        self._change(stage="Failed", reason=failure.reason, message=failure.message)
        if _has_cause(self._termination_log):
            return
        self._write_termination_message()

    def clear_termination_log(self) -> None:
        """Empty the termination log, which an earlier run on this machine may have written."""
        if self._termination_log is not None and self._termination_log.is_file():
            with suppress(OSError):
                self._termination_log.write_bytes(b"")

    def _change(self, **fields: Any) -> None:
        with self._lock:
            self._report = self._report.model_copy(update=fields)
        for listener in self._listeners:
            listener(self._report)

    def _write_termination_message(self) -> None:
        if self._termination_log is None:
            return
        try:
            self._termination_log.write_bytes(termination_message(self.report))
        except OSError as error:
            log.warning(f"Writing the termination message to {self._termination_log} failed", error=str(error))


def _has_cause(termination_log: Path | None) -> bool:
    try:
        told = TrainerReport.model_validate_json(termination_log.read_bytes()) if termination_log else None
    except (OSError, ValueError):
        return False
    return told is not None and told.stage == "Failed" and told.reason not in (_PREEMPTED, UNEXPECTED_REASON)


def termination_message(report: TrainerReport, limit: int | None = None) -> bytes:
    """Return `report` as JSON of at most `limit` bytes, the adapter first.

    Digits and figures that /progress has told go first, then the end of the message, the confusion matrix, all metrics.
    Of several trials each keeps its row: what a container may say at most has room for them.
    """
    limit = limit or (MAX_WITH_TRIALS if report.trials else constants.TERMINATION_LOG_MAX_BYTES)
    text = _json(report)
    if len(text) <= limit:
        return text
    lean = report.model_copy(
        update={
            "metrics": {key: _rounded(value) for key, value in report.metrics.items()},
            "progress": report.progress.model_copy(update=dict.fromkeys(_TOLD_BEFORE)),
            "execution_plan": _kept(report.execution_plan),
            "trials": [_brief(each) for each in report.trials],
        }
    )
    figures = {key: value for key, value in lean.metrics.items() if not key.startswith("confusion.")}
    for metrics in (lean.metrics, figures):
        shorter = _shortened(lean.model_copy(update={"metrics": metrics}), limit, _LEAST_MESSAGE_BYTES)
        if shorter is not None:
            return shorter
    least = lean.model_copy(update={"metrics": {}, "execution_plan": None, "gpu": None})
    if (shorter := _shortened(least, limit, least=0)) is not None:
        return shorter
    least = least.model_copy(update={"gate": []})  # its numbers are in the message
    if (shorter := _shortened(least, limit, least=0)) is not None:
        return shorter
    for name in ("adapter", "candidate"):  # both of its URIs are long: the base model's also stands in the job's spec
        if published := getattr(least, name):
            brief = published.model_copy(update={"base_model": _cut(published.base_model, 64)})
            bare = {name: brief, "message": "", "progress": Progress(step=least.progress.step), "artifacts": []}
            least = least.model_copy(update=bare)
    return _json(least)


def _brief(row: TrialReport) -> TrialReport:
    """Return what a trial's row keeps of figures that /progress has told."""
    value = None if row.value is None else _rounded(row.value)
    return row.model_copy(update={"value": value, "eval_loss": None, "step": None})


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _kept(plan: ExecutionPlan | None) -> ExecutionPlan | None:
    """Return what the next attempt is planned by, and what the next job is sized by."""
    return ExecutionPlan(**{key: getattr(plan, key) for key in _PLAN}) if plan else None


def _shortened(report: TrainerReport, limit: int, least: int) -> bytes | None:
    """Return `report` as JSON with as much of its message as fits; None if that is less than `least` bytes."""
    text = _json(report)
    if len(text) <= limit:
        return text
    room = limit - len(_json(report.model_copy(update={"message": "…"})))
    return _json(report.model_copy(update={"message": _cut(report.message, room) + "…"})) if room >= least else None


def _cut(text: str, room: int) -> str:
    """Return the start of `text` that takes at most `room` bytes inside a JSON string."""
    for index, character in enumerate(text):
        room -= len(json.dumps(character, ensure_ascii=False).encode()) - 2
        if room < 0:
            return text[:index]
    return text


def _json(report: TrainerReport) -> bytes:
    """Return `report` as JSON. The adapter comes first: the kubelet cuts the end off, where containers are many."""
    data = report.model_dump(mode="json", by_alias=True, exclude_none=True)
    ordered = {key: data[key] for key in _FIRST if key in data} | data
    return json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()
