"""What the operator and the trainer export, asked of their own registries."""

import html
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

ALERTS = Path(__file__).parents[1] / "charts/finetune-operator/files/alerts.yaml"
_OF_THE_RUNTIME = ("process_", "python_")
_CELLS = str.maketrans({"|": "\\|", "\n": " "})


def operator() -> list[Metric]:
    """Return the operator's metrics. Its gauges are read through Operator's own wiring, over empty parts."""
    from finetune_api.status import Progress
    from finetune_operator.core.objects.kinds import ObjectKey
    from finetune_operator.core.objects.observed import JobObject, TrialState
    from finetune_operator.main import Operator
    from finetune_operator.observability.job_metrics import JobMetrics
    from finetune_operator.observability.metrics import Metrics

    metrics = Metrics()
    usage = {"gpuHours": 1, "cost": 1, "currency": "USD"}
    found = JobObject.from_api({"metadata": {}, "status": {"phase": "Pending", "usage": usage}})
    job = replace(found, trial=TrialState("", "", False, False, "", "", 0, 1.0, {}, ""))
    JobMetrics(lambda: [job], 1, lambda: datetime.now(UTC), metrics.registry, "USD")
    progress = Progress(step=1, total_steps=1, percent=1.0, loss=1.0, eval_loss=1.0, tokens_per_second=1.0)
    parts: Any = SimpleNamespace(
        queue=SimpleNamespace(depth=0, delayed=0, longest_wait_seconds=lambda: 0.0),
        relister=SimpleNamespace(age=lambda: 0.0, denied={"": 403}),
        recorder=SimpleNamespace(depth=0),
        connection=SimpleNamespace(freshness=SimpleNamespace(ages=lambda: {("pods", ""): 0.0})),
        cache=SimpleNamespace(sizes=lambda: {"Pod": 0}, owners=lambda view: []),
        poller=SimpleNamespace(
            reports=lambda: [(ObjectKey("FineTuneJob", "a", "b"), SimpleNamespace(progress=progress))]
        ),
        settings=SimpleNamespace(job_metrics_limit=1),
    )
    parts._progress = lambda: Operator._progress(parts)
    metrics.watch(Operator._readings(parts))
    return _collected(metrics.registry)


def trainer() -> list[Metric]:
    """Return the trainer's metrics, with every value known."""
    from finetune_api.status import ExecutionPlan, Progress, TrainerReport
    from finetune_trainer.reporting import gpu
    from finetune_trainer.reporting.prometheus import Telemetry

    telemetry = Telemetry()
    progress = Progress(
        step=1,
        total_steps=1,
        epoch=1,
        loss=1,
        eval_loss=1,
        learning_rate=1,
        tokens_per_second=1,
        estimated_completion_time=datetime.now(UTC),
    )
    plan = ExecutionPlan(micro_batch_size=1, predicted_peak_memory_bytes=1, measured_peak_memory_bytes=1)
    telemetry.update(TrainerReport(stage="Training", progress=progress, execution_plan=plan))
    telemetry.track(1, dict.fromkeys(Telemetry._TRACKED_GAUGES, 1.0))
    telemetry.text()
    nvml: Any = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=0),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=0),
        NVMLError_NotSupported=RuntimeError,
    )
    known = {metric.name: metric for metric in gpu.GpuCollector(nvml).collect()}
    known |= {metric.name: metric for metric in _collected(telemetry.registry)}
    return list(known.values())


def _collected(registry: CollectorRegistry) -> list[Metric]:
    return [metric for metric in registry.collect() if not metric.name.startswith(_OF_THE_RUNTIME)]


def name(metric: Metric) -> str:
    """Return the name to ask Prometheus for; a histogram's has _bucket, _sum and _count."""
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def table(metrics: Iterable[Metric]) -> list[str]:
    """One row a metric."""
    rows = []
    for metric in sorted(metrics, key=lambda each: each.name):
        labels = sorted({label for sample in metric.samples for label in sample.labels} - {"le"}) or _labels(metric)
        shown = ", ".join(f"`{label}`" for label in labels)
        rows.append(f"| `{name(metric)}` | {metric.type} | {shown} | {metric.documentation.translate(_CELLS)} |")
    return ["| Metric | Type | Labels | Meaning |", "| --- | --- | --- | --- |", *rows]


#: Labels of metrics that have no sample before something happens.
_SILENT = {
    "finetune_operator_api_requests": ["verb", "resource", "code"],
    "finetune_operator_errors": ["error"],
    "finetune_operator_attempts_ended": ["namespace", "reason"],
    "finetune_operator_pod_disruptions": ["namespace"],
    "finetune_operator_time_to_first_step_seconds": ["namespace"],
    "finetune_operator_job_result": ["namespace", "name", "metric"],
}


def _labels(metric: Metric) -> list[str]:
    return _SILENT.get(metric.name, [])


def _code(text: str) -> str:
    """Inline code for a table's cell; between backticks a | cannot be escaped everywhere."""
    return f"<code>{html.escape(' '.join(text.split()), quote=False).replace('|', '&#124;')}</code>"


def alerts() -> list[str]:
    """Return the chart's alert rules."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    rows = [
        f"| `{rule['alert']}` | {rule['labels']['severity']} | {_code(rule['expr'])} | {rule.get('for', '')} |"
        for group in groups
        for rule in group["rules"]
    ]
    return ["| Alert | Severity | Fires when | For |", "| --- | --- | --- | --- |", *rows]
