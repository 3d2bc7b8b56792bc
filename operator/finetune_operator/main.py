"""Wiring: settings -> parts -> run until told to stop. `python -m finetune_operator`."""

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from itertools import islice

import structlog
import uvloop
from kubernetes.aio.config import ConfigException
from pydantic import ValidationError

from finetune_api import constants
from finetune_operator.core.objects.raw import Raw
from finetune_operator.kube.client import ApiError, Cluster
from finetune_operator.kube.session import Connection
from finetune_operator.observability import health, logs
from finetune_operator.observability.job_metrics import Fleet
from finetune_operator.observability.metrics import Metrics, Readings
from finetune_operator.reconcile.clock import Clock
from finetune_operator.reconcile.event_recorder import Recorder
from finetune_operator.reconcile.reconciler import Conflict, Reconciler
from finetune_operator.reconcile.work_queue import Queue, Result
from finetune_operator.settings import Settings
from finetune_operator.watch import kopf_handlers, kopf_settings
from finetune_operator.watch.cache import Cache
from finetune_operator.watch.kopf_runner import Watches
from finetune_operator.watch.progress import Poller
from finetune_operator.watch.relist import Lists
from finetune_operator.watch.wait_reasons import Notices

log = structlog.get_logger(__name__)

_START_PAUSES = (1, 2, 3, 5, 8, 13, 20)
BEAT_SECONDS = 10.0
#: The end of the process takes this long at most, well within the pod's grace period.
STOP_SECONDS = 20.0
#: Allocations between two looks for cyclic garbage, of which there is little.
GC_ALLOCATIONS = 20_000


class Operator:
    """All parts, put together."""

    def __init__(
        self, settings: Settings, connection: Connection, metrics: Metrics, clock: Clock | None = None
    ) -> None:
        self.settings, self.connection, self.metrics = settings, connection, metrics
        self.session = connection.session()
        self.cluster = Cluster(self.session, connection.configuration.host, settings.request_timeout_seconds)
        self.cache = Cache()
        self.clock = clock or Clock()
        self.poller = Poller(
            settings.progress_interval_seconds,
            settings.progress_timeout_seconds,
            settings.progress_concurrency,
            lambda key: self.queue.add(key),
        )
        self.recorder = Recorder(self.cluster, metrics, lambda: self.queue.depth > 0)
        fleet = Fleet(self.cache.jobs, settings.job_metrics_limit, self.clock, metrics.registry)
        self.reconciler = Reconciler(self.cluster, self.cache, self.poller, self.recorder, fleet, settings, self.clock)
        self.queue = Queue(self._reconcile, settings.workers, on_done=self._done)
        self.notices = Notices(self.cluster, self.cache, settings.namespaces, self.queue.add)
        self.lists = Lists(
            self.cluster,
            self.cache,
            settings.namespaces,
            settings.resync_seconds,
            on_news=self.queue.add,
            on_refused=connection.freshness.forget,
            on_restored=lambda: self.watches.restart(),
        )
        self.stop = asyncio.Event()
        self.watches = Watches(
            lambda: kopf_handlers.registry(self.cache, self.queue.add, connection.kopf_login),
            lambda: kopf_settings.kopf_settings(settings),
            settings.namespaces,
            on_start=lambda: _on_signals(self.stop),
            on_end=self._kopf_ended,
        )
        self.beat = time.monotonic()
        self.health = health.Health(self._signs(), settings, BEAT_SECONDS)
        connection.on_date, connection.on_list = self.clock.hear, self.lists.kopf_listed
        connection.is_echo, connection.is_known = self._is_echo, self._is_known
        metrics.watch(self._readings())

    async def _reconcile(self, key: str) -> Result:
        """Not where only some of a job's objects can be seen: the others would seem to be gone."""
        return await self.reconciler(key) if self.lists.serves(key) else Result()

    def _is_echo(self, resource: str, version: int) -> bool:
        kind = kopf_handlers.KIND_OF.get(resource)
        return kind is not None and self.cache.is_echo(kind, version)

    def _is_known(self, resource: str, obj: Raw) -> bool:
        kind = kopf_handlers.KIND_OF.get(resource)
        return kind is not None and self.cache.is_known(kind, obj)

    def _done(self, key: str, seconds: float, error: Exception | None) -> None:
        self.metrics.reconciled(seconds, error)
        if error is not None:
            expected = isinstance(error, ApiError | Conflict | OSError | TimeoutError)
            log.warning("a reconcile failed; it is tried again", key=key, error=str(error) or type(error).__name__,
                        exc_info=None if expected else error)  # fmt: skip

    def _kopf_ended(self, error: Exception) -> None:
        self.metrics.failed(error)
        self.lists.ask()

    def _signs(self) -> health.Signs:
        return health.Signs(
            longest_wait=self.queue.longest_wait_seconds,
            longest_run=self.queue.longest_run_seconds,
            beat_age=lambda: time.monotonic() - self.beat,
            list_age=self.lists.idle,
            watch_ages=self.connection.freshness.ages,
            reachable=self.connection.reach.seconds,
        )

    def _readings(self) -> Readings:
        return Readings(
            gauges={
                "queue_depth": ("Jobs that wait for a worker.", lambda: self.queue.depth),
                "queue_delayed": ("Jobs that wait for their time.", lambda: self.queue.delayed),
                "queue_longest_wait_seconds": ("Oldest wait for a worker.", self.queue.longest_wait_seconds),
                "resync_age_seconds": ("Since the last full list.", self.lists.age),
                "events_waiting": ("Events that are not posted yet.", lambda: self.recorder.depth),
            },
            watch_ages=self.connection.freshness.ages,
            refused=lambda: self.lists.refused,
            objects=self.cache.sizes,
            progress=lambda: islice(
                ((key, report.progress) for key, report in self.poller.reports()), self.settings.job_metrics_limit
            ),
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises SystemExit with a sentence when it cannot start."""
        _on_signals(self.stop)
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
            _limit_the_end()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await runner.cleanup()
            await self.session.close()

    async def work(self) -> None:
        """Do everything but serving HTTP, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._heartbeat())
            await self._wait_for_server()
            group.create_task(self.recorder.run())
            group.create_task(self.poller.run())
            group.create_task(self.queue.run())
            group.create_task(self.notices.run(self.settings.kueue))
            group.create_task(self.lists.run())
            group.create_task(self.watches.run())
            self.health.ready = True
            log.info("ready", jobs=len(self.cache.job_keys()), namespaces=list(self.settings.namespaces) or "all")

    async def _wait_for_server(self) -> None:
        """Wait for the API server, the CRD and the first lists; give up after start_timeout_seconds."""
        deadline = time.monotonic() + self.settings.start_timeout_seconds
        for turn in range(10**6):
            try:
                if await self.cluster.serves_finetunejobs():
                    await self.lists.once()
                    return
                problem = (
                    f"the CustomResourceDefinition {constants.PLURAL}.{constants.GROUP} is not installed: apply crds/"
                )
            except ApiError as error:
                problem = f"the API server refuses: {error.message or error}"
            except (OSError, TimeoutError) as error:
                host = self.connection.configuration.host
                problem = f"the API server at {host} does not answer: {error or type(error).__name__}"
            if time.monotonic() > deadline:
                raise SystemExit(f"cannot start: {problem}")
            log.warning("waiting to start", problem=problem)
            await asyncio.sleep(_START_PAUSES[min(turn, len(_START_PAUSES) - 1)])

    async def _heartbeat(self) -> None:
        while True:
            self.beat = time.monotonic()
            await asyncio.sleep(BEAT_SECONDS)


def _on_signals(stop: asyncio.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


def _limit_the_end() -> None:
    """The last resort, in a thread of its own: a task that cannot be cancelled would hold up the loop for ever."""
    loop = asyncio.get_running_loop()

    def give_up() -> None:
        names_left = sorted(task.get_name() for task in asyncio.all_tasks(loop))
        log.error("tasks did not end; the process does", tasks=names_left)
        os._exit(1)

    timer = threading.Timer(STOP_SECONDS, give_up)
    timer.daemon = True
    timer.start()


def _spare_the_collector() -> None:
    """Kopf's and the client's modules are 200,000 objects that live for ever. To look through them for garbage every
    few thousand allocations was a third of all the operator's CPU time.
    """
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
    """Run the operator. Exit code 1, with a sentence, when it cannot start."""
    try:
        settings = Settings()
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False):
            field = "_".join(map(str, item["loc"])).upper()
            sys.stderr.write(f"FINETUNE_OPERATOR_{field}: {item['msg']}\n")
        raise SystemExit(1) from None
    logs.configure(settings.log_level)
    _spare_the_collector()
    try:
        uvloop.run(_run(settings))
    except* SystemExit as group:
        raise SystemExit(str(group.exceptions[0])) from None
    except* OSError as group:
        raise SystemExit(f"cannot start: {group.exceptions[0]}") from None
