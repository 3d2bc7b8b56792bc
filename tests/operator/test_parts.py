"""The small parts by themselves: poller, notices, names of API calls, watches without echoes."""

import asyncio
import json
from typing import Any, cast

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import WaitReason
from finetune_operator.kube.session import Connection
from finetune_operator.kube.urls import resource_of, verb_of
from finetune_operator.kube.watch_stream import Events, version_in
from finetune_operator.observability.metrics import Metrics
from finetune_operator.watch import wait_reasons
from finetune_operator.watch.cache import Cache
from finetune_operator.watch.kopf_handlers import kopf_login
from finetune_operator.watch.progress import ProgressPoller

KEY = ObjectKey("FineTuneJob", "a", "b")


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
    assert wait_reasons.from_event(event) == wait_reasons.WaitReasonUpdate(
        "p1", WaitReason("FailedMount", 'secret "x" not found')
    )
    condition = {"type": "QuotaReserved", "status": "False", "message": "no quota"}
    workload = {"metadata": {"labels": {"kueue.x-k8s.io/job-uid": "c1"}}, "status": {"conditions": [condition]}}
    assert wait_reasons.from_workload(workload) == wait_reasons.WaitReasonUpdate("c1", WaitReason("Queued", "no quota"))
    assert wait_reasons.from_workload({"metadata": {}, "status": {"conditions": "?"}}) is None


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
        news: list[ObjectKey] = []
        poller = ProgressPoller(0.05, 1, 2, news.append, port=runner.addresses[0][1])
        work = asyncio.create_task(poller.run())
        poller.follow(KEY, "pod-1", "127.0.0.1")
        await asyncio.wait_for(asked.wait(), 5)
        await asyncio.sleep(0.2)
        report = poller.report(KEY)
        assert (report.progress.step if report else None) == step
        assert news == ([KEY] if step else []), "the same report twice is no news"
        poller.unfollow(KEY)
        assert poller.report(KEY) is None
        work.cancel()
        await runner.cleanup()

    asyncio.run(act())


@pytest.mark.parametrize(
    ("line", "version"),
    [
        (
            json.dumps({"type": "MODIFIED", "object": {"metadata": {"resourceVersion": "17"}}}, separators=(",", ":")),
            17,
        ),
        (json.dumps({"annotations": {"a": '{"resourceVersion":"3"}'}}, separators=(",", ":")), 0),
        ('{"object":{"metadata":{"resourceVersion":"x"}}}', 0),
        ('{"object":{"metadata":{"resourceVersion":"', 0),
        ("", 0),
    ],
)
def test_the_version_of_an_event_is_found_without_reading_it(line: str, version: int):
    assert version_in(line.encode()) == version


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_watch_without_the_echoes_of_our_own_writes_is_otherwise_the_same(size: int):
    body = b'{"v":"1"}\n{"v":"2"}\n{"v":"3"}\n{"v":"4"}'

    async def act() -> None:
        content = asyncio.StreamReader()
        content.feed_data(body)
        content.feed_eof()
        signs: list[None] = []
        events = Events(cast(Any, content), lambda: signs.append(None), lambda line: b"2" in line or b"3" in line)
        chunks = [chunk async for chunk in events.iter_chunked(size)]
        assert b"".join(chunks) == b'{"v":"1"}\n{"v":"4"}'
        assert b"" not in chunks, "which would end the watch"
        assert len(signs) >= len(body) / size

    asyncio.run(act())


def test_an_event_is_an_echo_when_it_shows_what_we_wrote_and_only_then():
    cache = Cache()
    made = {"metadata": {"name": "nli", "namespace": "team", "uid": "u", "resourceVersion": "7"}, "spec": {}}
    cache.put_own_write("FineTuneJob", made)
    assert not cache.is_echo("Job", 7)
    assert not cache.is_echo("FineTuneJob", 8)
    assert cache.is_echo("FineTuneJob", 7)
    assert not cache.is_echo("FineTuneJob", 7), "once: who watches anew is told again"


def test_kopf_is_told_of_its_lists_only_what_is_new_and_we_are_told_that_it_lists():
    items = [{"metadata": {"name": name, "namespace": "team", "uid": name, "resourceVersion": "7"}} for name in "ab"]
    heard: list[tuple[str, str]] = []

    async def act() -> None:
        async def answer(request: web.Request) -> web.Response:
            return web.json_response({"items": items, "metadata": {"resourceVersion": "9"}})

        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        configuration = Configuration()
        configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
        connection = Connection(configuration, Metrics().api_call)
        cache = Cache()
        cache.put("FineTuneJob", items[0])
        connection.is_known = lambda resource, obj: resource == "finetunejobs" and cache.is_known("FineTuneJob", obj)
        path = f"{configuration.host}/apis/finetune.dev/v1alpha1/namespaces/team/finetunejobs?limit=100"
        login = kopf_login(connection, lambda resource, namespace: heard.append((resource, namespace)))
        async with login.aiohttp_session as kopfs, connection.session() as ours:
            found = await (await kopfs.get(path)).json()
            await (await kopfs.get(f"{path}&continue=x")).read()
            await (await ours.get(path)).read()
        assert [obj["metadata"]["name"] for obj in found["items"]] == ["b"]
        assert found["metadata"] == {"resourceVersion": "9"}
        assert heard == [("finetunejobs", "team")], "a list is heard of once, and ours is not Kopf's"
        await runner.cleanup()

    asyncio.run(act())
