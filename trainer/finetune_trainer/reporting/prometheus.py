"""Prometheus metrics of one run (`finetune_trainer_*`, base units), fed by the TrainerReport and the training loop."""

import threading
import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from finetune_api.status import Stage, TrainerReport
from finetune_trainer.reporting import gpu

_CHECKPOINT_SECONDS = (0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300)


class Telemetry:
    """The run's metrics, in a registry of their own. A gauge appears once its value is known."""

    _PROGRESS_GAUGES = (
        ("step", "step", "Optimizer steps done."),
        ("total_steps", "steps", "Optimizer steps planned."),
        ("epoch", "epoch", "Passes over the training rows."),
        ("loss", "loss", "Latest training loss, nats per token."),
        ("eval_loss", "eval_loss", "Latest evaluation loss, nats per token."),
        ("learning_rate", "learning_rate", "Learning rate of the latest step."),
        ("tokens_per_second", "tokens_per_second", "Real tokens per second, never padding, over all GPUs."),
    )
    #: Values of the training loop that the report does not carry: key -> metric, help.
    _TRACKED_GAUGES = {
        "gradNorm": ("gradient_norm", "Norm of the gradients before clipping, of the latest step logged."),
        "secondsPerStep": ("step_duration_seconds", "Mean time of an optimizer step since the log line before."),
    }

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        gpu.register(self.registry)
        self._gauges: dict[str, Gauge] = {}
        self._stages = _Stages(
            Gauge(
                "finetune_trainer_stage_duration_seconds",
                "Time spent in each stage so far.",
                ["stage"],
                registry=self.registry,
            )
        )
        self.tokens = self._counter("tokens", "Real tokens trained on by this process's run, never padding.")
        self.checkpoints = self._counter("checkpoints", "Checkpoints saved.")
        self.evaluations = self._counter("evaluations", "Evaluations done.")
        self.out_of_memory = self._counter("gpu_out_of_memory", "Times the GPU ran out of memory and training went on.")
        self._checkpoint_seconds = Histogram(
            "finetune_trainer_checkpoint_duration_seconds",
            "Time to save one checkpoint in the store.",
            buckets=_CHECKPOINT_SECONDS,
            registry=self.registry,
        )

    def update(self, report: TrainerReport) -> None:
        """Take over the values of `report`; a listener of Reporter."""
        self._stages.enter(report.stage)
        for field, name, text in self._PROGRESS_GAUGES:
            self._set(name, text, getattr(report.progress, field))
        if report.progress.estimated_completion_time:
            self._set(
                "estimated_completion_timestamp_seconds",
                "When the last step should be done, Unix time.",
                report.progress.estimated_completion_time.timestamp(),
            )
        if plan := report.execution_plan:
            self._set("micro_batch_size", "Sequences per GPU in one forward pass.", plan.micro_batch_size)
            self._set(
                "gpu_memory_predicted_peak_bytes", "GPU memory the plan expects.", plan.predicted_peak_memory_bytes
            )
            self._set("gpu_memory_peak_bytes", "GPU memory the run reached.", plan.measured_peak_memory_bytes)

    def track(self, step: int, values: Mapping[str, Any]) -> None:
        """Take over what was logged at `step`: training (gradNorm, secondsPerStep, tokens) or evaluation (evalLoss)."""
        for key, (name, text) in self._TRACKED_GAUGES.items():
            self._set(name, text, values.get(key))
        self.tokens.inc(values.get("tokens") or 0)
        if "evalLoss" in values:
            self.evaluations.inc()

    def checkpoint_saved(self, seconds: float) -> None:
        """Count a checkpoint that is in the store; saving it took `seconds`."""
        self.checkpoints.inc()
        self._checkpoint_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return the body of /metrics, in Prometheus' exposition format."""
        self._stages.update()
        return generate_latest(self.registry)

    def _set(self, name: str, text: str, value: float | None) -> None:
        if value is None:
            return
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"finetune_trainer_{name}", text, registry=self.registry)
        self._gauges[name].set(value)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"finetune_trainer_{name}", text, registry=self.registry)


class _Stages:
    """Seconds by stage. The run enters stages; the HTTP thread reads the time."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._lock = threading.Lock()
        self._now: Stage = "Starting"
        self._since = time.monotonic()

    def enter(self, stage: Stage) -> None:
        with self._lock:
            if stage != self._now:
                self._add_elapsed()
                self._now = stage

    def update(self) -> None:
        with self._lock:
            self._add_elapsed()

    def _add_elapsed(self) -> None:
        now = time.monotonic()
        self._gauge.labels(self._now).inc(now - self._since)
        self._since = now
