"""Kopf, started again when it gives up. Most requests it repeats by itself, for ever; what it does not repeat (a watch
that is told 410 or 404 by the status of the answer, an error in the stream) ends it.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kopf
import structlog

log = structlog.get_logger(__name__)

#: Pauses before Kopf is started again; it begins anew after it has run for a while.
PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0)
_A_WHILE = 60.0
#: How often it is looked whether every watcher is still there.
LOOK_SECONDS = 5.0
#: A watcher can miss that it was cancelled, so it is told again this often.
_AGAIN_SECONDS = 1.0
#: What has not ended after this will not: it is left behind, and said so.
END_SECONDS = 7.0
#: Kopf's name of a task that holds a watch. A test counts them, so that another name would be noticed.
_WATCHER = "watcher for "
_KOPF = str(Path(kopf.__file__).parent)


class Watches:
    """Runs one Kopf after another. `on_start` is called with each: Kopf takes the signal handlers for itself."""

    def __init__(
        self,
        registry: Callable[[], kopf.OperatorRegistry],
        settings: Callable[[], kopf.OperatorSettings],
        namespaces: tuple[str, ...],
        on_start: Callable[[], None],
        on_end: Callable[[Exception], None],
    ) -> None:
        self._registry, self._settings, self._namespaces = registry, settings, namespaces
        self._on_start, self._on_end = on_start, on_end
        self._restart = asyncio.Event()

    def restart(self) -> None:
        """Begin all watches anew."""
        self._restart.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        failures = 0
        while True:
            began = time.monotonic()
            try:
                await self._once()
            except Exception as error:
                failures = 1 if time.monotonic() - began > _A_WHILE else failures + 1
                log.warning("Kopf gave up; it is started again", error=str(error) or type(error).__name__)
                self._on_end(error)
                await asyncio.sleep(PAUSES[min(failures, len(PAUSES)) - 1])

    async def _once(self) -> None:
        """Run Kopf until it ends, or is to be restarted. Not through kopf.operator: at its end that waits for, and
        cancels, every task of the process."""
        self._restart.clear()
        tasks = await kopf.spawn_tasks(
            registry=self._registry(),
            settings=self._settings(),
            namespaces=self._namespaces,
            clusterwide=not self._namespaces,
            standalone=True,
        )
        self._on_start()
        restart, loss = asyncio.create_task(self._restart.wait()), asyncio.create_task(_lose_a_watcher())
        try:
            done, _ = await asyncio.wait({*tasks, restart, loss}, return_when=asyncio.FIRST_COMPLETED)
            for ended in done - {restart}:
                ended.result()
            if restart not in done:
                raise RuntimeError("one of its tasks ended by itself")
        finally:
            await _end({*tasks, restart, loss})


async def _lose_a_watcher() -> None:
    """Until one is gone. Kopf cancels a watcher whose watch has been silent for too long, and if that one hands on an
    event just then, it ends; Kopf's orchestrator takes a cancelled one for none of its business.
    """
    most = 0
    while (found := len(_watchers())) >= most:
        most = found
        await asyncio.sleep(LOOK_SECONDS)


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    """End one Kopf. Of its watchers only its orchestrator knows, and that forgets them when one of them has failed; a
    watcher left behind goes on watching, and cannot be cancelled any more once its helpers were, as at a process's end.
    So watchers go first. Of what Kopf looks up at its start nobody knows: that goes last.
    """
    for task in tasks:
        task.cancel()
    left = await _ended(tasks, _watchers) | await _ended(set(), _kopfs)
    if left:
        log.error("tasks of Kopf do not end; they are left behind", tasks=sorted(task.get_name() for task in left))


async def _ended(tasks: set[asyncio.Task[Any]], find: Callable[[], set[asyncio.Task[Any]]]) -> set[asyncio.Task[Any]]:
    """Wait for `tasks`, and cancel and wait for whatever `find` finds; what has not ended when time is over."""
    began = time.monotonic()
    while left := {task for task in tasks if not task.done()} | find():
        if time.monotonic() - began > END_SECONDS:
            return left
        for task in find():
            task.cancel()
        done, _ = await asyncio.wait(left, timeout=_AGAIN_SECONDS)
        for task in done:
            if not task.cancelled():
                task.exception()  # looked at, or asyncio would print it
    return set()


def _watchers() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task.get_name().startswith(_WATCHER)}


def _kopfs() -> set[asyncio.Task[Any]]:
    """Tasks that run Kopf's code."""
    codes = {task: getattr(task.get_coro(), "cr_code", None) for task in asyncio.all_tasks()}
    return {task for task, code in codes.items() if code is not None and code.co_filename.startswith(_KOPF)}
