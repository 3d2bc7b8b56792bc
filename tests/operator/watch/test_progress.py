"""The poller of the trainers' /progress."""

import asyncio
import itertools
import json
from datetime import UTC, datetime, timedelta

import pytest
from aiohttp import web

from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.watch.progress import ProgressPoller

KEY = ObjectKey("FineTuneJob", "a", "b")
START = datetime(2026, 11, 1, tzinfo=UTC)


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
        def heard(key: ObjectKey) -> None:
            if not poller.silent_since(key):
                news.append(key)

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
        poller = ProgressPoller(0.05, 1, 2, heard, port=runner.addresses[0][1])
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


def test_three_polls_without_an_answer_are_silence_and_one_answer_ends_it():
    async def act() -> None:
        async def progress(request: web.Request) -> web.Response:
            return web.json_response({"stage": "Training"}, status=200 if answers else 500)

        def heard(key: ObjectKey) -> None:
            news.append(poller.silent_since(key))
            changed.set()

        async def until_changed() -> None:
            await asyncio.wait_for(changed.wait(), 5)
            changed.clear()

        answers, news, changed = True, [], asyncio.Event()
        app = web.Application()
        app.router.add_get("/progress", progress)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        moments = itertools.count()
        poller = ProgressPoller(
            0.01, 1, 2, heard, port=runner.addresses[0][1], clock=lambda: START + timedelta(seconds=next(moments))
        )
        work = asyncio.create_task(poller.run())
        poller.follow(KEY, "pod-1", "127.0.0.1")
        await until_changed()
        answers = False
        await until_changed()
        assert news[0] is None and news[1] > START
        await asyncio.sleep(0.1)
        assert (len(news), poller.silent_since(KEY)) == (2, news[1]), "silence is news once, and since then"
        assert poller.report(KEY) is not None, "what it said last still holds"
        answers = True
        await until_changed()
        assert news[2:] == [None]
        work.cancel()
        await runner.cleanup()

    asyncio.run(act())
