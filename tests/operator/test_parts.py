"""The small parts by themselves: queue, cache, clock, poller, notices, names of API calls, health."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web

from finetune_operator import notices
from finetune_operator.cache import Cache
from finetune_operator.clock import Clock
from finetune_operator.core.observed import Notice
from finetune_operator.http import Health
from finetune_operator.poller import Poller
from finetune_operator.queue import Backoff, Queue, Result
from finetune_operator.session import resource_of, verb_of

Object = dict[str, Any]


async def run_queue(queue: Queue, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
    work = asyncio.create_task(queue.run())
    try:
        await asyncio.wait_for(act(), 10)
    finally:
        work.cancel()


def test_a_key_is_never_reconciled_twice_at_once_and_late_news_count():
    running, most, seen = 0, 0, 0
    done = asyncio.Event()

    async def reconcile(key: str) -> Result:
        nonlocal running, most, seen
        running += 1
        most = max(most, running)
        if seen == 0:
            queue.add(key)
            queue.add(key)
        await asyncio.sleep(0.01)
        running, seen = running - 1, seen + 1
        if seen == 2:
            done.set()
        return Result()

    queue = Queue(reconcile, workers=4)

    async def act() -> None:
        for _ in range(5):
            queue.add("a/b")
        await done.wait()
        await asyncio.sleep(0.05)

    asyncio.run(run_queue(queue, act))
    assert (most, seen) == (1, 2), "five requests at once are one, and two while it runs are one more"


def test_an_error_is_tried_again_with_growing_pauses_and_counted():
    errors: list[Exception | None] = []
    done = asyncio.Event()

    async def reconcile(key: str) -> Result:
        if len(errors) < 3:
            raise OSError("no answer")
        done.set()
        return Result()

    queue = Queue(reconcile, 1, Backoff(0.001, 0.01), on_done=lambda key, seconds, error: errors.append(error))

    async def act() -> None:
        queue.add("a/b")
        await done.wait()
        await asyncio.sleep(0)

    asyncio.run(run_queue(queue, act))
    assert [type(error).__name__ for error in errors] == ["OSError", "OSError", "OSError", "NoneType"]


def test_pauses_double_up_to_a_cap_and_are_never_the_same_for_all():
    backoff = Backoff(1, 30)
    pauses = [[backoff.pause(n) for _ in range(50)] for n in range(1, 10)]
    assert all(min(30, 2 ** (n - 1)) / 2 <= p <= min(30, 2 ** (n - 1)) for n, row in enumerate(pauses, 1) for p in row)
    assert len({round(pause, 6) for pause in pauses[5]}) > 40


def test_health_tells_a_hanging_reconcile_and_a_late_heartbeat():
    async def reconcile(key: str) -> Result:
        await asyncio.Event().wait()
        return Result()

    queue = Queue(reconcile, 1)
    age = 0.0
    health = Health(queue, 0.05, lambda: age, 10)

    async def act() -> None:
        nonlocal age
        assert health.problems() == []
        queue.add("a/b")
        queue.add("a/c")
        await asyncio.sleep(0.1)
        assert [problem.split(":")[0] for problem in health.problems()] == [
            "the queue stands still",
            "a reconcile hangs",
        ]
        age = 31
        assert "heartbeat" in health.problems()[-1]

    asyncio.run(run_queue(queue, act))


def test_a_clock_that_is_set_back_goes_on():
    wall = 1_000_000.0
    clock = Clock(lambda: wall)
    first = clock()
    wall += 60
    ahead = clock()
    wall -= 3600
    assert ahead - first > timedelta(seconds=59)
    assert clock() >= ahead


def job(uid: str = "j1", version: int = 5, **more: Any) -> Object:
    meta = {"name": "nli", "namespace": "team", "uid": uid, "resourceVersion": str(version)}
    return {"metadata": meta, "spec": {}} | more


def child(uid: str = "c1", owner: str = "j1", version: int = 6) -> Object:
    labels = {"finetune.dev/job": "nli", "finetune.dev/attempt": "1"}
    meta = {"name": "nli-1", "namespace": "team", "uid": uid, "resourceVersion": str(version), "labels": labels}
    return {"metadata": meta | {"ownerReferences": [{"uid": owner, "controller": True}]}, "spec": {}}


def test_the_cache_takes_in_what_is_newer_and_says_whether_it_was():
    cache = Cache()
    assert cache.put("FineTuneJob", job(version=5)) == "team/nli"
    assert cache.put("FineTuneJob", job(version=5)) is None, "the echo of our own write"
    assert cache.put("FineTuneJob", job(version=4)) is None, "an answer that was overtaken"
    assert cache.put("FineTuneJob", job(version=10)) == "team/nli", "versions are numbers, not words"


def test_what_was_deleted_is_not_brought_back_by_a_late_answer():
    cache = Cache()
    cache.put("FineTuneJob", job())
    cache.put("Job", child())
    cache.drop("Job", child())
    cache.put("Job", child(version=99))
    observed = cache.observed("team/nli", None)
    assert observed is not None and observed.children == ()


def test_a_full_list_forgets_what_is_gone_but_nothing_younger_than_itself():
    cache = Cache()
    cache.put("FineTuneJob", job())
    cache.put("Job", child("old", version=6))
    cache.put("Job", child("young", version=9))
    assert cache.keep_only("Job", [], version=7) == {"team/nli"}
    observed = cache.observed("team/nli", None)
    assert observed is not None and [c.uid for c in observed.children] == ["young"]


def test_children_of_an_earlier_job_of_the_same_name_are_not_ours():
    cache = Cache()
    cache.put("FineTuneJob", job("j2", version=20))
    cache.put("Job", child(owner="j1"))
    observed = cache.observed("team/nli", None)
    assert observed is not None and observed.children == ()


@pytest.mark.parametrize(
    ("method", "path", "verb", "resource"),
    [
        ("GET", "/apis/finetune.dev/v1alpha1/namespaces/a/finetunejobs", "list", "finetunejobs"),
        ("GET", "/apis/finetune.dev/v1alpha1/finetunejobs", "list", "finetunejobs"),
        ("GET", "/api/v1/namespaces/a/configmaps/x", "get", "configmaps"),
        ("PATCH", "/apis/finetune.dev/v1alpha1/namespaces/a/finetunejobs/x/status", "patch", "finetunejobs/status"),
        ("POST", "/apis/batch/v1/namespaces/a/jobs", "create", "jobs"),
        ("GET", "/apis/batch/v1", "list", "discovery"),
    ],
)
def test_api_calls_are_counted_under_their_names(method: str, path: str, verb: str, resource: str):
    assert (verb_of(method, path, False), resource_of(path)) == (verb, resource)


def test_notices_come_from_events_and_workloads():
    about = {"uid": "p1", "kind": "Pod"}
    event = {"involvedObject": about, "reason": "FailedMount", "message": 'secret "x" not found'}
    assert notices.of_event(event) == notices.Word("p1", Notice("FailedMount", 'secret "x" not found'))
    condition = {"type": "QuotaReserved", "status": "False", "message": "no quota"}
    workload = {"metadata": {"labels": {"kueue.x-k8s.io/job-uid": "c1"}}, "status": {"conditions": [condition]}}
    assert notices.of_workload(workload) == notices.Word("c1", Notice("Queued", "no quota"))
    assert notices.of_workload({"metadata": {}, "status": {"conditions": "?"}}) is None


@pytest.mark.parametrize(
    ("body", "step"),
    [
        (json.dumps({"stage": "Training", "progress": {"step": 7}}), 7),
        ("not json", None),
        ('{"stage": "Dancing"}', None),
        (json.dumps({"stage": "Training", "message": "x" * 100_000}), None),
    ],
)
def test_the_poller_believes_reports_and_nothing_else(body: str, step: int | None):
    async def act() -> None:
        async def progress(request: web.Request) -> web.Response:
            asked.set()
            return web.Response(text=body)

        asked = asyncio.Event()
        app = web.Application()
        app.router.add_get("/progress", progress)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        news: list[str] = []
        poller = Poller(0.05, 1, 2, news.append, port=runner.addresses[0][1])
        work = asyncio.create_task(poller.run())
        poller.follow("a/b", "pod-1", "127.0.0.1")
        await asyncio.wait_for(asked.wait(), 5)
        await asyncio.sleep(0.2)
        report = poller.report("a/b")
        assert (report.progress.step if report else None) == step
        assert news == (["a/b"] if step else []), "the same report twice is no news"
        poller.leave("a/b")
        assert poller.report("a/b") is None
        work.cancel()
        await runner.cleanup()

    asyncio.run(act())
