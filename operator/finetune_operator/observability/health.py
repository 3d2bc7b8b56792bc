"""/healthz, /readyz and /metrics. Health is judged by the work itself, not by the process being there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from finetune_api import constants
from finetune_operator.settings import Settings

#: What Kopf watches; explanations (events, Workloads) are watched beside it, and nothing depends on them.
WATCHED = (constants.PLURAL, "jobs", "pods")

#: A heartbeat, a full list or a watch is late when it has missed this many turns.
MISSED = 3


@dataclass(frozen=True)
class Signs:
    """Signs of life. All are seconds."""

    longest_wait: Callable[[], float]
    """The oldest wait for a worker."""
    longest_run: Callable[[], float]
    """The oldest reconcile under way."""
    beat_age: Callable[[], float]
    list_age: Callable[[], float]
    """Since the last try of a full list, be it that it failed."""
    watch_ages: Callable[[], Mapping[tuple[str, str], float]]
    reachable: Callable[[], float]
    """How long the API server has answered without a break."""


class Health:
    """What is wrong with the operator, in sentences; none when it is well."""

    def __init__(self, signs: Signs, settings: Settings, beat_seconds: float) -> None:
        self._signs, self._settings, self._beat_seconds = signs, settings, beat_seconds
        self.ready = False

    def problems(self) -> list[str]:
        """For the liveness probe: trouble that a restart could end. An API server that is away is none."""
        signs, settings = self._signs, self._settings
        found = []
        if (waited := signs.longest_wait()) > settings.stuck_seconds:
            found.append(f"the queue stands still: a job has waited {waited:.0f} s for a worker")
        if (ran := signs.longest_run()) > settings.stuck_seconds:
            found.append(f"a reconcile hangs: it has run for {ran:.0f} s")
        if (age := signs.beat_age()) > MISSED * self._beat_seconds:
            found.append(f"the heartbeat is late: the last one was {age:.0f} s ago")
        if self.ready and (age := signs.list_age()) > MISSED * settings.resync_seconds:
            found.append(f"the full list is late: the last try was {age:.0f} s ago")
        # Kopf begins a silent watch anew by itself, which takes an API server that answers.
        limit = MISSED * settings.watch_inactivity_seconds
        for (resource, namespace), age in signs.watch_ages().items():
            if resource in WATCHED and min(age, signs.reachable()) > limit:
                where = f" in {namespace}" if namespace else ""
                found.append(f"the watch of {resource}{where} is dead: its last sign of life was {age:.0f} s ago")
        return found


async def serve(host: str, port: int, health: Health, registry: CollectorRegistry) -> web.AppRunner:
    """Start serving; `runner.addresses` says where. Raises OSError when the port is taken."""

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
