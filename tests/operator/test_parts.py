"""The small parts by themselves: poller, notices, names of API calls."""

import asyncio
import json

import pytest
from aiohttp import web

from finetune_operator import notices
from finetune_operator.core.observed import Notice
from finetune_operator.poller import Poller
from finetune_operator.session import resource_of, verb_of


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
