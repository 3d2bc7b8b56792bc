"""Wiring: settings -> parts -> run until SIGTERM. `python -m finetune_operator`."""

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice

import structlog
import uvloop
from kubernetes.aio.config import ConfigException
from pydantic import ValidationError

from finetune_api.status import Progress
from finetune_operator.core import controllers
from finetune_operator.core.controllers import Registry
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.core.objects.raw import Raw
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.errors import ApiError
from finetune_operator.kube.session import Connection
from finetune_operator.observability import health, logs
from finetune_operator.observability.job_metrics import JobMetrics, final_progress
from finetune_operator.observability.metrics import Metrics, Readings
from finetune_operator.reconcile.clock import Clock
from finetune_operator.reconcile.event_recorder import EventRecorder
from finetune_operator.reconcile.reconciler import Conflict, Reconciler
from finetune_operator.reconcile.work_queue import Result, WorkQueue
from finetune_operator.settings import Settings
from finetune_operator.watch.cache import Cache
from finetune_operator.watch.kopf_handlers import kopf_login, kopf_registry
from finetune_operator.watch.kopf_runner import KopfSource
from finetune_operator.watch.kopf_settings import kopf_settings
from finetune_operator.watch.progress import ProgressPoller
from finetune_operator.watch.relist import Relister
from finetune_operator.watch.source import WatchSource, feed
from finetune_operator.watch.wait_reasons import WaitReasonWatcher

log = structlog.get_logger(__name__)

_START_PAUSES = (1, 2, 3, 5, 8, 13, 20)
HEARTBEAT_SECONDS = 10.0
#: Force the exit after this time, well within the pod's grace period.
SHUTDOWN_SECONDS = 20.0
#: Allocations between two runs of the garbage collector; reference cycles are rare here.
GC_ALLOCATIONS = 20_000


class Operator:
    """All parts, wired together.

    Args:
        settings: The operator's settings.
        connection: How to reach the API server.
        metrics: Counters and the registry of /metrics.
        clock: The time of day; None makes one.
        registry: The controllers to run; None takes the operator's own.
    """

    def __init__(
        self,
        settings: Settings,
        connection: Connection,
        metrics: Metrics,
        clock: Clock | None = None,
        registry: Registry | None = None,
    ) -> None:
        registry = registry or controllers.registry(settings.cost_label)
        self.settings, self.connection, self.metrics, self.registry = settings, connection, metrics, registry
        self.session = connection.session()
        host, timeout = connection.configuration.host, settings.request_timeout_seconds
        self.client = KubeClient(self.session, host, timeout, registry.watched.values(), metrics.unreadable)
        self.cache = Cache(registry)
        self.clock = clock or Clock()
        self.poller = ProgressPoller(
            settings.progress_interval_seconds,
            settings.progress_timeout_seconds,
            settings.progress_concurrency,
            lambda key: self.queue.add(key),
            clock=self.clock,
        )
        self.recorder = EventRecorder(self.client, metrics, lambda: self.queue.depth > 0)
        job_metrics = JobMetrics(
            lambda: self.cache.owners(JobObject),
            settings.job_metrics_limit,
            self.clock,
            metrics.registry,
            settings.currency if settings.gpu_prices else None,
        )
        self.reconciler = Reconciler(
            self.client,
            self.cache,
            self.poller,
            self.recorder,
            job_metrics.record_status,
            settings,
            self.clock,
            metrics.status_denied.inc,
            lambda key, seconds: self.queue.add_after(key, seconds),
        )
        self.queue = WorkQueue(self._reconcile, settings.workers, on_done=self._done)
        self.wait_reasons = WaitReasonWatcher(self.client, self.cache, settings.namespaces, self.queue.add)
        self.relister = Relister(
            self.client,
            self.cache,
            settings.namespaces,
            settings.resync_seconds,
            on_change=self.queue.add,
            on_denied=connection.freshness.evict_namespace,
            on_restored=lambda: self.source.restart(),
            on_unreadable=metrics.unreadable,
        )
        self.stop = asyncio.Event()
        self.source: WatchSource = KopfSource(
            lambda emit: kopf_registry(
                registry.watched.values(), emit, lambda: kopf_login(connection, self.relister.source_listed)
            ),
            lambda: kopf_settings(settings, registry),
            settings.namespaces,
            on_start=lambda: _stop_on_signals(self.stop),
            on_end=self._source_ended,
        )
        self.heartbeat = time.monotonic()
        watched = {kind.plural for kind in registry.watched.values()}
        self.health = health.Health(self._health_signals(), settings, HEARTBEAT_SECONDS, watched)
        connection.on_date = self.clock.observe
        connection.is_echo, connection.is_known = self._is_echo, self._is_known
        connection.on_unreadable = metrics.unreadable
        metrics.watch(self._readings())

    async def _reconcile(self, key: ObjectKey) -> Result:
        """Skip a key whose namespace is denied: objects that we cannot see would seem to be gone."""
        return await self.reconciler(key) if self.relister.serves(key) else Result()

    def _is_echo(self, resource: str, version: int) -> bool:
        kind = self.registry.kind_of(resource)
        return kind is not None and self.cache.is_echo(kind, version)

    def _is_known(self, resource: str, obj: Raw) -> bool:
        kind = self.registry.kind_of(resource)
        return kind is not None and self.cache.is_known(kind, obj)

    def _done(self, key: ObjectKey, seconds: float, error: Exception | None) -> None:
        self.metrics.reconciled(seconds, error)
        if error is not None:
            expected = isinstance(error, ApiError | Conflict | OSError | TimeoutError)
            log.warning("reconcile failed; retrying", key=str(key), error=str(error) or type(error).__name__,
                        exc_info=None if expected else error)  # fmt: skip

    def _source_ended(self, error: Exception) -> None:
        self.metrics.failed(error)
        self.relister.request()

    def _health_signals(self) -> health.HealthSignals:
        return health.HealthSignals(
            longest_wait=self.queue.longest_wait_seconds,
            longest_run=self.queue.longest_run_seconds,
            heartbeat_age=lambda: time.monotonic() - self.heartbeat,
            relist_age=self.relister.attempt_age,
            watch_ages=self.connection.freshness.ages,
            reachable=self.connection.reachability.seconds,
        )

    def _readings(self) -> Readings:
        return Readings(
            gauges={
                "queue_depth": ("Jobs that wait for a worker.", lambda: self.queue.depth),
                "queue_delayed": ("Jobs that wait for their time.", lambda: self.queue.delayed),
                "queue_longest_wait_seconds": ("Oldest wait for a worker.", self.queue.longest_wait_seconds),
                "resync_age_seconds": ("Since the last full list.", self.relister.age),
                "events_waiting": ("Events that are not posted yet.", lambda: self.recorder.depth),
            },
            watch_ages=self.connection.freshness.ages,
            denied=lambda: self.relister.denied,
            objects=self.cache.sizes,
            progress=self._progress,
        )

    def _progress(self) -> Iterator[tuple[ObjectKey, Progress]]:
        """Return the progress of running jobs and of finished ones, at most the limit of each."""
        limit = self.settings.job_metrics_limit
        yield from islice(((key, report.progress) for key, report in self.poller.reports()), limit)
        yield from final_progress(self.cache.owners(JobObject), limit)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises SystemExit with a sentence when it cannot start."""
        _stop_on_signals(self.stop)
        runner = await health.serve(
            self.settings.http_host, self.settings.http_port, self.health, self.metrics.registry
        )
        log.info("serving /healthz, /readyz and /metrics", addresses=[f"{a[0]}:{a[1]}" for a in runner.addresses])
        work = asyncio.create_task(self.work())
        stopping = asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            log.info("stopping")
            await self.recorder.flush(2.0)
        finally:
            self.stop.set()
            _force_exit_later()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await runner.cleanup()
            await self.session.close()

    async def work(self) -> None:
        """Run all parts but the HTTP server, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beat())
            await self._wait_for_server()
            group.create_task(self.recorder.run())
            group.create_task(self.poller.run())
            group.create_task(self.queue.run())
            group.create_task(self.wait_reasons.run(self.settings.kueue))
            group.create_task(self.relister.run())
            group.create_task(feed(self.source, self.cache, self.queue.add))
            self.health.ready = True
            log.info("ready", objects=len(self.cache.keys()), namespaces=list(self.settings.namespaces) or "all")

    async def _wait_for_server(self) -> None:
        """Wait for the API server, the CRDs and the first lists, at most start_timeout_seconds."""
        deadline = time.monotonic() + self.settings.start_timeout_seconds
        for attempt in range(10**6):
            try:
                missing = [kind for kind in self.registry.reconciled if not await self.client.is_served(kind)]
                if not missing:
                    await self.relister.once()
                    return
                names = ", ".join(f"{kind.plural}.{kind.group}" for kind in missing)
                problem = f"not installed: CustomResourceDefinition {names}; apply crds/"
            except ApiError as error:
                problem = f"the API server denied the request: {error.message or error}"
            except (OSError, TimeoutError) as error:
                host = self.connection.configuration.host
                problem = f"the API server at {host} does not answer: {error or type(error).__name__}"
            if time.monotonic() > deadline:
                raise SystemExit(f"cannot start: {problem}")
            log.warning("start failed; retrying", problem=problem)
            await asyncio.sleep(_START_PAUSES[min(attempt, len(_START_PAUSES) - 1)])

    async def _beat(self) -> None:
        while True:
            self.heartbeat = time.monotonic()
            await asyncio.sleep(HEARTBEAT_SECONDS)


def _stop_on_signals(stop: asyncio.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


def _force_exit_later() -> None:
    """Exit from a thread when the shutdown hangs: a task that ignores its cancellation would block the loop forever."""
    loop = asyncio.get_running_loop()

    def force_exit() -> None:
        pending = sorted(task.get_name() for task in asyncio.all_tasks(loop))
        log.error("shutdown timed out; exiting with pending tasks", tasks=pending)
        os._exit(1)

    timer = threading.Timer(SHUTDOWN_SECONDS, force_exit)
    timer.daemon = True
    timer.start()


def _tune_garbage_collector() -> None:
    """Exclude imported modules from garbage collection: scanning their 200,000 objects was a third of all CPU time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS)


async def _run(settings: Settings) -> None:
    metrics = Metrics()
    try:
        connection = await Connection.load(metrics.api_call)
    except (ConfigException, OSError) as error:
        raise SystemExit(f"cannot start: neither a service account nor a kubeconfig: {error}") from None
    await Operator(settings, connection, metrics).run()


def main() -> None:
    """Run the operator. Exit with code 1 and a sentence when it cannot start."""
    try:
        settings = Settings()
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False):
            field = "_".join(map(str, item["loc"])).upper()
            sys.stderr.write(f"FINETUNE_OPERATOR_{field}: {item['msg']}\n")
        raise SystemExit(1) from None
    logs.configure(settings.log_level)
    _tune_garbage_collector()
    try:
        uvloop.run(_run(settings))
    except* SystemExit as group:
        raise SystemExit(str(group.exceptions[0])) from None
    except* OSError as group:
        raise SystemExit(f"cannot start: {group.exceptions[0]}") from None
