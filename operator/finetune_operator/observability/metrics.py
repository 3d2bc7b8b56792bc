"""The operator's own Prometheus metrics: base units, and only labels that are bounded, some by a setting."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from importlib.metadata import version
from typing import Any, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_api.status import Progress, RunningStage
from finetune_operator.core.attempts.progress import percent
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import JobObject

PREFIX = "finetune_operator"
PHASES = (
    "Pending",
    "Queued",
    *get_args(RunningStage),
    "Finishing",
    "NotAnswering",
    "Stalled",
    "Suspended",
    "Succeeded",
    "Failed",
)
TERMINAL_PHASES = ("Succeeded", "Failed")
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters that code increments, and the registry that is served as /metrics."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.reconcile_seconds = Histogram(
            f"{PREFIX}_reconcile_duration_seconds", "Time of one reconcile.", buckets=_BUCKETS, registry=self.registry
        )
        self.errors = Counter(
            f"{PREFIX}_errors", "Errors by class, each retried with backoff.", ["error"], registry=self.registry
        )
        self._api_calls = Counter(
            f"{PREFIX}_api_requests",
            "Requests to the API server.",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self.events_dropped = Counter(
            f"{PREFIX}_events_dropped", "Events given up because too many waited.", registry=self.registry
        )

        self._unreadable = Counter(
            f"{PREFIX}_unreadable_objects",
            "Objects of which the API server's answers could be read in parts only, or not at all.",
            ["resource"],
            registry=self.registry,
        )

        self.status_denied = Counter(
            f"{PREFIX}_status_writes_denied",
            "Statuses that the API server calls invalid; each is tried again at the next full list.",
            registry=self.registry,
        )

    def unreadable(self, resource: str, count: int) -> None:
        """Count objects that nest too deep, or are no JSON."""
        self._unreadable.labels(resource).inc(count)

    def api_call(self, verb: str, resource: str, code: str) -> None:
        """Count a request to the API server; `code` is "error" when no answer came."""
        self._api_calls.labels(verb, resource, code).inc()

    def reconciled(self, seconds: float, error: Exception | None) -> None:
        """Count a reconcile."""
        self.reconcile_seconds.observe(seconds)
        if error is not None:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """Count an error by its class, one of the API server by the class of its status."""
        code = getattr(error, "code", None)
        self.errors.labels(f"Api{code // 100}xx" if isinstance(code, int) else type(error).__name__).inc()

    def watch(self, readings: "Readings") -> None:
        """Read these at every scrape."""
        self.registry.register(_Scraped(readings))


@dataclass(frozen=True)
class Readings:
    """Functions that return the values of the gauges. Waits and ages are seconds."""

    gauges: Mapping[str, tuple[str, Callable[[], float]]]
    """Name -> help and function."""
    watch_ages: Callable[[], Mapping[tuple[str, str], float]]
    """By resource and namespace."""
    denied: Callable[[], Mapping[str, int]]
    """Namespaces that may not be listed, with the HTTP status."""
    objects: Callable[[], Mapping[str, int]]
    progress: Callable[[], Iterable[tuple[ObjectKey, Progress]]]
    """Key and progress of running and of finished jobs, already cut to the limit."""


class _Scraped(Collector):
    """Gauges that are read at each scrape."""

    def __init__(self, readings: Readings) -> None:
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        readings = self._readings
        yield gauge("build_info", "Version of the operator.", ("version",), {(version("finetune-operator"),): 1})
        yield gauge("cached_objects", "Objects in memory.", ("kind",), {(k,): n for k, n in readings.objects().items()})
        yield gauge(
            "watch_age_seconds",
            "Since the last event or bookmark of a watch; servers send a bookmark every minute.",
            ("resource", "watched_namespace"),  # not `namespace`: scrapers fill in the operator's own where it is empty
            readings.watch_ages(),
        )
        yield gauge(
            "namespace_refused",
            "Configured namespaces to which the API server denies access, with the HTTP status.",
            ("watched_namespace",),
            {(namespace,): code for namespace, code in readings.denied().items()},
        )
        for name, (text, reading) in readings.gauges.items():
            yield gauge(name, text, (), {(): reading()})
        yield from self._progress()

    def _progress(self) -> Iterator[Metric]:
        fields = {
            "step": ("step", "Optimizer steps done."),
            "total_steps": ("steps", "Optimizer steps in all."),
            "loss": ("loss", "Latest training loss, nats per token."),
            "eval_loss": ("eval_loss", "Latest evaluation loss, nats per token."),
            "tokens_per_second": ("tokens_per_second", "Real tokens over all GPUs."),
        }
        found = [((key.namespace, key.name), progress) for key, progress in self._readings.progress()]
        for field, (suffix, text) in fields.items():
            values = {key: value for key, progress in found if (value := getattr(progress, field)) is not None}
            yield gauge(f"job_{suffix}", text, ("namespace", "name"), values)
        done = {key: value / 100 for key, progress in found if (value := percent(progress)) is not None}
        text = "Share of the training that is done; 1 once the job has succeeded."
        yield gauge("job_progress_ratio", text, ("namespace", "name"), done)


def latest(jobs: Iterable[JobObject], limit: int, *, over: bool) -> list[JobObject]:
    """Return the `limit` jobs that changed last of those that are over, or of those that are not."""
    return nlargest(limit, (job for job in jobs if (job.phase in TERMINAL_PHASES) == over), key=lambda job: job.version)


def gauge(name: str, text: str, labels: Sequence[str], values: Mapping[Any, float]) -> Metric:
    """Return a gauge with one sample per key of `values`; a key holds the values of `labels`."""
    family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family
