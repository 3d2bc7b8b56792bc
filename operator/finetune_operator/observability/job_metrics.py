"""Prometheus metrics of all FineTuneJobs: phases, GPUs held, waits, ended attempts, time to the first step.

Gauges are read from the cache at each scrape; counters grow with each status write.
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from heapq import nlargest
from itertools import islice

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from finetune_api import exit_codes
from finetune_api.status import Progress
from finetune_operator.core.attempts import failure
from finetune_operator.core.objects import status_io
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import WAITING_PHASES, JobObject, TrialState
from finetune_operator.observability import result_metrics, usage_metrics
from finetune_operator.observability.metrics import PHASES, PREFIX, TERMINAL_PHASES, gauge, latest

#: Phases in which the pods hold their GPUs.
GPU_HOLDING_PHASES = frozenset(PHASES) - {*WAITING_PHASES, *TERMINAL_PHASES, "Suspended"}
#: Reasons that start at 0: a counter that starts at 1 hides its first event from increase().
REASONS = tuple(
    sorted(
        {
            *exit_codes.REASONS,
            failure.CRASHED,
            failure.INIT_FAILED,
            failure.JOB_DEADLINE,
            failure.JOB_DELETED,
            failure.JOB_REFUSED,
            failure.NODE_LOST,
            failure.POD_LOST,
            failure.REPORT_LOST,
            failure.SPEC_CHANGED,
            failure.SUSPENDED,
        }
    )
)
#: A namespace without jobs keeps its counters this long, for the scrapes to come.
KEPT_WITHOUT_JOBS = timedelta(hours=1)
_TO_FIRST_STEP = (10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 86400)


def final_progress(jobs: Iterable[JobObject], limit: int) -> Iterator[tuple[ObjectKey, Progress]]:
    """Yield the final progress, without a pace, of the `limit` finished jobs that changed last.

    A scrape sees a job that trained for less than its interval, or its last steps, only here.
    """
    for job in latest(jobs, limit, over=True):
        if progress := status_io.read(job.status).progress:
            yield job.key, progress.model_copy(update={"tokens_per_second": None})


class JobMetrics(Collector):
    """Register it once. `jobs` returns the cached jobs; at most `limit` unfinished ones get gauges of their own.

    `currency` is that of the GPUs' prices, None where there are none.
    """

    def __init__(
        self,
        jobs: Callable[[], Iterable[JobObject]],
        limit: int,
        clock: Callable[[], datetime],
        registry: CollectorRegistry,
        currency: str | None = None,
    ) -> None:
        self._jobs, self._limit, self._clock = jobs, limit, clock
        self._namespaces: dict[str, datetime] = {}
        """When each namespace with counters last had a job."""
        registry.register(self)  # before the counters: `collect` creates their zeros
        self._attempts = Counter(
            f"{PREFIX}_attempts_ended", "Ended attempts by reason.", ["namespace", "reason"], registry=registry
        )
        self._disruptions = Counter(
            f"{PREFIX}_pod_disruptions",
            "Pods of attempts that were evicted, preempted, or lost with their node.",
            ["namespace"],
            registry=registry,
        )
        self._first_step = Histogram(
            f"{PREFIX}_time_to_first_step_seconds",
            "From a job's creation to its first optimizer step.",
            ["namespace"],
            buckets=_TO_FIRST_STEP,
            registry=registry,
        )
        self._usage = usage_metrics.UsageMetrics(registry, currency)

    def record_status(self, before: object, after: object) -> None:
        """Count what happened between two statuses of one job; other kinds are ignored."""
        if not isinstance(before, JobObject) or not isinstance(after, JobObject):
            return
        self._start_at_zero(after.namespace)
        old, new = status_io.read(before.status), status_io.read(after.status)
        ended = {attempt.job_name for attempt in old.attempts if attempt.reason}
        for attempt in new.attempts:
            if attempt.reason and attempt.job_name not in ended:
                self._attempts.labels(after.namespace, attempt.reason).inc()
        disrupted = {attempt.job_name: attempt.disruptions or 0 for attempt in old.attempts}
        for attempt in new.attempts:
            more = (attempt.disruptions or 0) - disrupted.get(attempt.job_name, 0)
            self._disruptions.labels(after.namespace).inc(max(0, more))
        self._usage.record(after, old.usage, new.usage)
        started = not (old.progress and old.progress.step) and new.progress and new.progress.step
        if started and after.created_at:
            seconds = (self._clock() - after.created_at).total_seconds()
            self._first_step.labels(after.namespace).observe(max(0.0, seconds))

    def _start_at_zero(self, namespace: str) -> None:
        if namespace not in self._namespaces:
            self._first_step.labels(namespace)
            self._disruptions.labels(namespace)
            for reason in REASONS:
                self._attempts.labels(namespace, reason)
        self._namespaces[namespace] = self._clock()

    def _forget_vanished(self) -> None:
        """Remove the counters of namespaces that have long had no job: a cluster makes and deletes them without end."""
        now = self._clock()
        for namespace in [name for name, seen in self._namespaces.items() if now - seen > KEPT_WITHOUT_JOBS]:
            del self._namespaces[namespace]
            self._first_step.remove(namespace)
            self._disruptions.remove(namespace)
            self._attempts.remove_by_labels({"namespace": namespace})
            self._usage.forget(namespace)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: registering must not read the cache."""
        return ()

    def collect(self) -> Iterator[Metric]:
        jobs = list(self._jobs())
        namespaces = {job.namespace for job in jobs}
        for namespace in namespaces:
            self._start_at_zero(namespace)
        for namespace, value in sorted({(job.namespace, job.cost_label) for job in jobs}):
            self._usage.start_at_zero(namespace, value)
        self._forget_vanished()
        phases = {(namespace, phase): 0 for namespace in namespaces for phase in PHASES}
        phases |= Tally((job.namespace, job.phase) for job in jobs)
        yield gauge("jobs", "FineTuneJobs by phase.", ("namespace", "phase"), phases)

        held = {(namespace,): 0 for namespace in namespaces}
        waits = {(namespace,): 0.0 for namespace in namespaces}
        now = self._clock()
        for job in jobs:
            where = (job.namespace,)
            if job.phase in GPU_HOLDING_PHASES:
                held[where] += job.gpus
            if job.gpus and job.phase in WAITING_PHASES and job.waiting_since:
                waits[where] = max(waits[where], (now - job.waiting_since).total_seconds())
        yield gauge("gpus_allocated", "GPUs held by jobs whose pods run.", ("namespace",), held)
        text = "Longest present wait of a GPU job to start."
        yield gauge("gpu_jobs_longest_wait_seconds", text, ("namespace",), waits)

        unfinished = sorted(
            (job for job in jobs if job.phase not in TERMINAL_PHASES), key=lambda job: job.phase in WAITING_PHASES
        )
        attempts = {(job.namespace, job.name): job.attempts for job in unfinished[: self._limit]}
        yield gauge("job_attempts", "Attempts of a job that is not over.", ("namespace", "name"), attempts)
        finished, others = (latest(jobs, self._limit, over=over) for over in (True, False))
        yield from usage_metrics.of_jobs([*finished, *others])
        yield from result_metrics.of_jobs(finished, others)
        yield from _of_sweeps(jobs, self._limit)


def _of_sweeps(jobs: Iterable[JobObject], limit: int) -> Iterator[Metric]:
    """Yield the gauges of the `limit` trials that changed last, and those of their sweeps."""
    trials = [(job, job.trial) for job in jobs if job.trial]
    shown = nlargest(limit, trials, key=lambda each: each[0].version)
    phases = {(job.namespace, trial.sweep, phase): 0 for job, trial in shown for phase in PHASES}
    held = {(job.namespace, trial.sweep): 0 for job, trial in shown}
    for job, trial in trials:
        sweep = (job.namespace, trial.sweep)
        if sweep in held:
            for each in _trials_of(job, trial):
                phases[*sweep, each.phase] = phases.get((*sweep, each.phase), 0) + 1
            held[sweep] += job.gpus if job.phase in GPU_HOLDING_PHASES else 0
    yield gauge("sweep_trials", "Trials of a sweep by phase.", ("namespace", "sweep", "phase"), phases)
    yield gauge("sweep_gpus_allocated", "GPUs held by a sweep's trials.", ("namespace", "sweep"), held)
    labels = ("namespace", "sweep", "trial")
    named = {(job.namespace, trial.sweep, each.name): each for job, trial in shown for each in _trials_of(job, trial)}
    named = dict(islice(named.items(), limit))
    steps = {name: each.step for name, each in named.items()}
    yield gauge("trial_step", "Optimizer steps done, as in the status of a trial's job.", labels, steps)
    losses = {name: each.eval_loss for name, each in named.items() if each.eval_loss is not None}
    yield gauge("trial_eval_loss", "Latest held-out loss of a trial, nats per token.", labels, losses)


@dataclass(frozen=True)
class _Trial:
    """What is shown of one trial; `phase` is one of a job's."""

    name: str
    phase: str
    step: int
    eval_loss: float | None


def _trials_of(job: JobObject, state: TrialState) -> list[_Trial]:
    """Return the trial of a job, or those that share it: one that is stopped early counts as suspended."""
    if state.packed is None:
        return [_Trial(job.name.removeprefix(f"{state.sweep}-"), job.phase, state.step, state.eval_loss)]
    phases: dict[str, str] = {"Running": job.phase, "Stopped": "Suspended"}
    return [
        _Trial(row.name, phases.get(row.phase, row.phase), row.step or 0, row.eval_loss)
        for row in state.packed.values()
    ]
