"""Kopf as a WatchSource. It restarts Kopf when Kopf stops.

Kopf retries most requests without end. It stops when a watch is answered with the status 410 or 404, or when a stream
holds an error.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import kopf
import structlog

from finetune_operator.watch.source import WatchEvent

log = structlog.get_logger(__name__)

#: Pauses before Kopf starts again; the first one follows once Kopf has run for STABLE_SECONDS.
PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0)
_STABLE_SECONDS = 60.0
#: Check this often that every watcher is alive.
WATCHER_CHECK_SECONDS = 5.0
#: A watcher can miss its cancellation, so cancel it again this often.
_CANCEL_AGAIN_SECONDS = 1.0
#: Abandon tasks that have not stopped by then.
STOP_SECONDS = 7.0
#: Kopf's name of a task that runs a watch. A test counts these tasks, so it fails when Kopf changes the name.
_WATCHER = "watcher for "
_KOPF = str(Path(kopf.__file__).parent)


class KopfSource:
    """Runs one Kopf after another and yields what its handlers see.

    Args:
        registry: Make Kopf's registry; its handlers call the function given.
        settings: Make Kopf's settings.
        namespaces: Namespaces to watch; empty for all.
        on_start: Called after each start: Kopf takes the signal handlers for itself.
        on_end: Called with the error that stopped Kopf.
    """

    def __init__(
        self,
        registry: Callable[[Callable[[WatchEvent], None]], kopf.OperatorRegistry],
        settings: Callable[[], kopf.OperatorSettings],
        namespaces: tuple[str, ...],
        on_start: Callable[[], None],
        on_end: Callable[[Exception], None],
    ) -> None:
        self._registry, self._settings, self._namespaces = registry, settings, namespaces
        self._on_start, self._on_end = on_start, on_end
        self._restart = asyncio.Event()

    def restart(self) -> None:
        """Start all watches again."""
        self._restart.set()

    async def events(self) -> AsyncIterator[WatchEvent]:
        """Yield what the handlers of the running Kopf see; see WatchSource."""
        queue: asyncio.Queue[WatchEvent | None] = asyncio.Queue()
        run = asyncio.create_task(self._run(queue.put_nowait))
        run.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            await run
        finally:
            run.cancel()
            await asyncio.wait({run})

    async def _run(self, emit: Callable[[WatchEvent], None]) -> None:
        failures = 0
        while True:
            started = time.monotonic()
            try:
                await self._once(emit)
            except Exception as error:
                failures = 1 if time.monotonic() - started > _STABLE_SECONDS else failures + 1
                log.warning("Kopf stopped; restarting it", error=str(error) or type(error).__name__)
                self._on_end(error)
                await asyncio.sleep(PAUSES[min(failures, len(PAUSES)) - 1])

    async def _once(self, emit: Callable[[WatchEvent], None]) -> None:
        """Run Kopf until it stops or `restart` is called.

        Not with kopf.operator: when it stops, it cancels every task of the process and waits for them.
        """
        self._restart.clear()
        tasks = await kopf.spawn_tasks(
            registry=self._registry(emit),
            settings=self._settings(),
            namespaces=self._namespaces,
            clusterwide=not self._namespaces,
            standalone=True,
        )
        self._on_start()
        restart, loss = asyncio.create_task(self._restart.wait()), asyncio.create_task(_watcher_lost())
        try:
            done, _ = await asyncio.wait({*tasks, restart, loss}, return_when=asyncio.FIRST_COMPLETED)
            for ended in done - {restart}:
                ended.result()
            if restart not in done:
                raise RuntimeError("a task of Kopf ended unexpectedly")
        finally:
            await _stop({*tasks, restart, loss})


async def _watcher_lost() -> None:
    """Return when a Kopf watcher task disappears; Kopf does not restart it.

    Kopf cancels a watcher whose watch is silent for too long. If the watcher handles an event at that moment, it ends,
    and Kopf's orchestrator ignores cancelled watchers.
    """
    most = 0
    while (found := len(_watchers())) >= most:
        most = found
        await asyncio.sleep(WATCHER_CHECK_SECONDS)


async def _stop(tasks: set[asyncio.Task[Any]]) -> None:
    """Stop one Kopf, its watchers first and its discovery tasks last.

    Only Kopf's orchestrator knows the watchers, and it forgets them when one of them fails. A forgotten watcher goes
    on, and once its helper tasks are cancelled it cannot be cancelled any more. No task knows the discovery tasks.
    """
    for task in tasks:
        task.cancel()
    left = await _stopped(tasks, _watchers) | await _stopped(set(), _kopf_tasks)
    if left:
        log.error("Kopf tasks did not stop in time; abandoning them", tasks=sorted(task.get_name() for task in left))


async def _stopped(tasks: set[asyncio.Task[Any]], find: Callable[[], set[asyncio.Task[Any]]]) -> set[asyncio.Task[Any]]:
    """Cancel and await `tasks` and whatever `find` finds; return those that have not stopped in time."""
    started = time.monotonic()
    while left := {task for task in tasks if not task.done()} | find():
        if time.monotonic() - started > STOP_SECONDS:
            return left
        for task in find():
            task.cancel()
        done, _ = await asyncio.wait(left, timeout=_CANCEL_AGAIN_SECONDS)
        for task in done:
            if not task.cancelled():
                task.exception()  # retrieved, or asyncio would print it
    return set()


def _watchers() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task.get_name().startswith(_WATCHER)}


def _kopf_tasks() -> set[asyncio.Task[Any]]:
    """Return the tasks that run Kopf's code."""
    codes = {task: getattr(task.get_coro(), "cr_code", None) for task in asyncio.all_tasks()}
    return {task for task, code in codes.items() if code is not None and code.co_filename.startswith(_KOPF)}
