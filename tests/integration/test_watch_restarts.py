"""Kopf begun anew: nothing of the one before lives on beside it, and nothing that we know is taken in again.

Here the operator's own code runs in the test's process, Kopf included, so that its tasks can be counted.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kopf
import pytest

from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.watch import kopf_runner, kopf_settings, source
from finetune_operator.watch.source import WatchEvent
from support.operator.fixtures import Jobs
from support.operator.in_process import living
from support.server.client import Kube
from support.server.fault_proxy import ApiProxy
from support.server.server import Cluster

WATCHED = ("finetunejobs", "finetunesweeps", "jobs", "pods")
_KOPF = str(Path(kopf.__file__).parent)


def kopfs_tasks() -> Counter[str]:
    """The tasks that run Kopf's code, by their names without numbers."""
    codes = {task: getattr(task.get_coro(), "cr_code", None) for task in asyncio.all_tasks()}
    return Counter(
        task.get_name().partition("<")[0].partition("-")[0]
        for task, code in codes.items()
        if code is not None and code.co_filename.startswith(_KOPF)
    )


async def until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.05)


def are_open(proxy: ApiProxy) -> bool:
    found = proxy.open_watches()
    return all(found[resource] >= 1 for resource in WATCHED)


@pytest.mark.parametrize("how", ["404", "410 status", "restart", "lost"])
def test_of_watches_that_begin_anew_the_old_ones_are_gone(
    how: str, cluster: Cluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One watch is refused, which may end Kopf; it is the others that may stay."""
    monkeypatch.setattr(kopf_runner, "PAUSES", (0.1,))
    monkeypatch.setattr(kopf_runner, "WATCHER_CHECK_SECONDS", 0.2)

    async def act() -> None:
        async with ApiProxy(cluster.access) as proxy, living(proxy, namespace) as operator:
            await until(lambda: are_open(proxy), "all watches are open")
            await asyncio.sleep(2)  # the workers of the namespace's first objects have ended
            before = kopfs_tasks()
            for turn in range(4):
                asked = Counter(proxy.watched)
                if how == "restart":
                    operator.source.restart()
                elif how == "lost":
                    await asyncio.sleep(1)  # it has been counted
                    next(task for task in asyncio.all_tasks() if task.get_name().startswith("watcher for ")).cancel()
                else:
                    proxy.expire_watches(how, f"/{WATCHED[turn % len(WATCHED)]}")
                mine = [path for path in asked if path.endswith(WATCHED)]
                await until(lambda asked=asked, mine=mine: all(proxy.watched[p] > asked[p] for p in mine), "anew")
                await until(lambda: are_open(proxy), "all watches are open again")
            await asyncio.sleep(2)
            assert kopfs_tasks() == before
            assert len([name for name in before.elements() if name.startswith("watcher for ")]) == len(WATCHED)
            assert {resource: proxy.open_watches()[resource] for resource in WATCHED} == dict.fromkeys(WATCHED, 1)
            ending = time.monotonic()
        assert time.monotonic() - ending < 5
        assert not kopfs_tasks()

    asyncio.run(act())


def test_a_kopf_that_is_ended_while_it_looks_around_leaves_nothing(cluster: Cluster, namespace: str) -> None:
    """At its start it asks for kinds, in tasks that it does not keep; here nobody answers them."""

    def lookups() -> int:
        return sum(getattr(task.get_coro(), "__name__", "") == "_read_old_api" for task in asyncio.all_tasks())

    async def act() -> None:
        async with ApiProxy(cluster.access) as proxy, living(proxy, namespace) as operator:
            await until(lambda: are_open(proxy), "all watches are open")
            proxy.away = True
            for _ in range(3):
                operator.source.restart()
                await asyncio.sleep(1)
                assert lookups() == 1
        assert not kopfs_tasks()

    asyncio.run(act())


def test_of_what_kopf_lists_only_what_we_do_not_know_is_taken_in(
    cluster: Cluster, kube: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kopf starts a task for each object it lists, and keeps it there: with thousands, most of the memory there is."""
    listed: list[Any] = []
    take = source.take

    def noted(cache: Any, event: WatchEvent, enqueue: Any) -> None:
        listed.extend([event.object["metadata"]["name"]] if event.type is None else [])
        take(cache, event, enqueue)

    monkeypatch.setattr(source, "take", noted)
    monkeypatch.setattr(kopf_settings, "KOPF_PAGE", 3)
    jobs = Jobs(kube)
    for number in range(8):
        jobs.create(f"nli-{number}")

    async def act() -> None:
        async with ApiProxy(cluster.access) as proxy, living(proxy, str(kube.namespace)) as operator:
            await until(lambda: are_open(proxy), "all watches are open")
            await until(lambda: operator.cache.sizes()["Job"] == 8, "the Jobs are made")
            if cluster.has_job_controller:
                await until(lambda: operator.cache.sizes()["Pod"] == 8, "their pods, too")
            await asyncio.sleep(3)  # nothing changes any more
            listed.clear()
            asked = Counter(proxy.watched)
            operator.source.restart()
            await until(lambda: all(proxy.watched[p] > asked[p] for p in asked if p.endswith(WATCHED)), "anew")
            await asyncio.sleep(1)
            assert operator.cache.sizes()["FineTuneJob"] == 8
            assert listed == []
            jobs.create("another")
            key = ObjectKey("FineTuneJob", str(kube.namespace), "another")
            await until(lambda: operator.cache.owner(key) is not None, "seen")

    asyncio.run(act())
