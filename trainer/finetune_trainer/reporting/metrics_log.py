"""Every number of a run, in one place: training/metrics.jsonl, Prometheus, and the experiment trackers."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from finetune_trainer.errors import reason
from finetune_trainer.reporting.open_trackers import Track, open_trackers
from finetune_trainer.settings import Settings
from finetune_trainer.stores.json_numbers import drop_non_finite

log = structlog.get_logger(__name__)


class MetricsLog:
    """Sends what the run measures to all who keep it.

    A sink that fails is dropped with a warning; it never ends a run. Only rank 0 writes the file and has trackers.
    """

    def __init__(self, file: Path, prometheus: Track) -> None:
        """`file` is training/metrics.jsonl of the adapter; `prometheus` is Telemetry.track."""
        self._file = file
        self._sinks: dict[str, Track] = {"Prometheus": prometheus}

    def open_trackers(self, settings: Settings, work: Path, exit_stack: ExitStack) -> None:
        """Also send to the trackers that the job and the environment ask for, until `exit_stack` closes."""
        self._sinks |= exit_stack.enter_context(open_trackers(settings, work))

    def log(self, step: int, values: Mapping[str, Any], timing: Mapping[str, float | None] | None = None) -> None:
        """Log what was measured at `step`, in training or by an evaluation.

        `timing` is not written to metrics.jsonl, whose lines are the same for the same run but for time and speed.
        """
        self._write(step=step, time=datetime.now(UTC).isoformat(timespec="seconds"), **values)
        self._send(step, {**values, **(timing or {})})

    def log_baseline(self, values: Mapping[str, float]) -> None:
        """Log the base model's metrics, as `<name>Before` at step 0; the confusion matrix goes to the file alone."""
        before = {f"{key}Before": value for key, value in values.items()}
        self._write(step=0, **before)
        self._send(0, {key: value for key, value in before.items() if "." not in key})

    def log_final(self, step: int, values: Mapping[str, float]) -> None:
        """Log the published adapter's metrics, as `final/<name>`; metrics.jsonl has them already."""
        self._send(step, {f"final/{key}": value for key, value in values.items()})

    def _write(self, **values: Any) -> None:
        """Append one line. Values that JSON has no number for are left out."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(drop_non_finite(values), allow_nan=False) + "\n")

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        for name, sink in list(self._sinks.items()):
            try:
                sink(step, numbers)
            except Exception as error:
                log.warning(f"{name} failed; disabled for the rest of this run", error=reason(error))
                del self._sinks[name]
