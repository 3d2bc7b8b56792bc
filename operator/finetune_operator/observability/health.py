"""Serve /healthz, /readyz and /metrics. Health follows from the work done, not from the process being alive."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from finetune_operator.settings import Settings

#: A heartbeat, a full list or a watch is late after this many missed intervals.
MAX_MISSED = 3


@dataclass(frozen=True)
class HealthSignals:
    """Ages and waits that show whether the operator works. All are seconds."""

    longest_wait: Callable[[], float]
    """The longest wait for a worker."""
    longest_run: Callable[[], float]
    """The longest running reconcile."""
    heartbeat_age: Callable[[], float]
    relist_age: Callable[[], float]
    """Since the last relist attempt, successful or not."""
    watch_ages: Callable[[], Mapping[tuple[str, str], float]]
    """By resource and namespace."""
    reachable: Callable[[], float]
    """How long the API server has answered without errors."""


class Health:
    """Finds what is wrong with the operator. `watched` are the plurals whose watches it needs."""

    def __init__(
        self, signals: HealthSignals, settings: Settings, heartbeat_seconds: float, watched: Collection[str]
    ) -> None:
        self._signals, self._settings, self._heartbeat_seconds = signals, settings, heartbeat_seconds
        self._watched = watched
        self.ready = False

    def problems(self) -> list[str]:
        """Return sentences for the liveness probe about trouble that a restart could end.

        An API server that does not answer is no such trouble.
        """
        signals, settings = self._signals, self._settings
        found = []
        if (waited := signals.longest_wait()) > settings.stuck_seconds:
            found.append(f"work queue stuck: the oldest job has waited {waited:.0f} s")
        if (ran := signals.longest_run()) > settings.stuck_seconds:
            found.append(f"reconcile stuck: it has run for {ran:.0f} s")
        if (age := signals.heartbeat_age()) > MAX_MISSED * self._heartbeat_seconds:
            found.append(f"heartbeat late: the last one was {age:.0f} s ago")
        if self.ready and (age := signals.relist_age()) > MAX_MISSED * settings.resync_seconds:
            found.append(f"relist late: the last attempt was {age:.0f} s ago")
        # Kopf restarts a silent watch by itself, for which the API server must answer.
        limit = MAX_MISSED * settings.watch_inactivity_seconds
        for (resource, namespace), age in signals.watch_ages().items():
            if resource in self._watched and min(age, signals.reachable()) > limit:
                where = f" in {namespace}" if namespace else ""
                found.append(f"watch of {resource}{where} dead: its last event or bookmark was {age:.0f} s ago")
        return found


async def serve(host: str, port: int, health: Health, registry: CollectorRegistry) -> web.AppRunner:
    """Start serving; `runner.addresses` holds the addresses. Raises OSError when the port is taken."""

    async def healthz(request: web.Request) -> web.Response:
        problems = health.problems()
        return web.Response(status=500 if problems else 200, text="\n".join(problems) or "ok")

    async def readyz(request: web.Request) -> web.Response:
        text = "ok" if health.ready else "waiting for the first lists from the API server"
        return web.Response(status=200 if health.ready else 503, text=text)

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
