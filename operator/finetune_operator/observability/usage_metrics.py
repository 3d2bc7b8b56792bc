"""What jobs use of the GPUs and what it costs: counters by namespace and label, gauges by job."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import Metric
from pydantic import ValidationError
from pydantic_core import from_json

from finetune_api.status import Usage
from finetune_operator.core.objects import raw
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.observability.metrics import PREFIX, gauge

#: Values of the label that get counters of their own in one namespace: who makes jobs chooses them.
MAX_LABEL_VALUES = 50
OTHER = "other"


class UsageMetrics:
    """Counters that grow when an attempt ends. `currency` is None where the administrator gave no prices."""

    def __init__(self, registry: CollectorRegistry, currency: str | None) -> None:
        self._currency = currency
        self._values: dict[str, set[str]] = {}
        """By namespace: the label's values that have counters."""
        self._seconds = Counter(
            f"{PREFIX}_gpu_seconds",
            "GPUs multiplied by the seconds that pods ran, of attempts that have ended.",
            ["namespace", "cost_label"],
            registry=registry,
        )
        self._cost = Counter(
            f"{PREFIX}_gpu_cost",
            "Cost of attempts that have ended on GPUs with a price.",
            ["namespace", "cost_label", "currency"],
            registry=registry,
        )

    def start_at_zero(self, namespace: str, value: str) -> str:
        """Create the counters of a label's value; return the value that they have.

        A counter that starts above 0 hides its start from increase().
        """
        known = self._values.setdefault(namespace, set())
        if value not in known and len(known) >= MAX_LABEL_VALUES:
            value = OTHER
        if value not in known:
            known.add(value)
            self._seconds.labels(namespace, value)
            if self._currency:
                self._cost.labels(namespace, value, self._currency)
        return value

    def record(self, job: JobObject, before: Usage | None, after: Usage | None) -> None:
        """Count what a job has used between two of its statuses."""
        if after is None:
            return
        value, old = self.start_at_zero(job.namespace, job.cost_label), before or Usage()
        self._seconds.labels(job.namespace, value).inc(max(0.0, after.gpu_hours - old.gpu_hours) * 3600)
        if after.cost is not None and after.currency:
            more = max(0.0, after.cost - (old.cost or 0.0))
            self._cost.labels(job.namespace, value, after.currency).inc(more)

    def forget(self, namespace: str) -> None:
        """Remove the counters of a namespace."""
        self._values.pop(namespace, None)
        self._seconds.remove_by_labels({"namespace": namespace})
        self._cost.remove_by_labels({"namespace": namespace})


def _usage_of(job: JobObject) -> Usage | None:
    """Return what the status tells, without reading all of it: this happens at each scrape."""
    try:
        found = raw.mapping(from_json(job.status), "usage")
        return Usage.model_validate(found) if found else None
    except ValidationError:
        return None


def of_jobs(jobs: Iterable[JobObject]) -> Iterator[Metric]:
    """Yield the gauges of these jobs."""
    used = ((job, _usage_of(job)) for job in jobs)
    found = {(job.namespace, job.name): usage for job, usage in used if usage}
    text = "GPUs multiplied by the seconds that a job's pods ran, of its attempts that have ended."
    seconds = {name: usage.gpu_hours * 3600 for name, usage in found.items()}
    yield gauge("job_gpu_seconds", text, ("namespace", "name"), seconds)
    text = "What a job's attempts that have ended cost on GPUs with a price."
    costs = {(*name, used.currency or ""): used.cost for name, used in found.items() if used.cost is not None}
    yield gauge("job_gpu_cost", text, ("namespace", "name", "currency"), costs)
