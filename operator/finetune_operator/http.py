"""/healthz, /readyz and /metrics. Health is judged by the work itself, not by the process being there."""

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from finetune_operator.queue import Queue

#: The heartbeat is late when it has missed this many beats.
MISSED_BEATS = 3


class Health:
    """What is wrong with the operator, in sentences; none when it is well."""

    def __init__(self, queue: Queue, stuck_seconds: float, beat_age: Callable[[], float], beat_seconds: float) -> None:
        self._queue, self._stuck = queue, stuck_seconds
        self._beat_age, self._beat_seconds = beat_age, beat_seconds
        self.ready = False

    def problems(self) -> list[str]:
        """For the liveness probe: trouble that a restart could end. An API server that is away is none."""
        found = []
        if (waited := self._queue.longest_wait_seconds()) > self._stuck:
            found.append(f"the queue stands still: a job has waited {waited:.0f} s for a worker")
        if (ran := self._queue.longest_run_seconds()) > self._stuck:
            found.append(f"a reconcile hangs: it has run for {ran:.0f} s")
        if (age := self._beat_age()) > MISSED_BEATS * self._beat_seconds:
            found.append(f"the heartbeat is late: the last one was {age:.0f} s ago")
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
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
