"""The poller of the trainers' /progress."""

import asyncio
import json

import pytest
from aiohttp import web

from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.watch.progress import ProgressPoller

KEY = ObjectKey("FineTuneJob", "a", "b")


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
