"""/healthz, served as it is in production: 500 with the sentence that says what a restart could end, and only then."""

import asyncio
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.kube.freshness import Reachability
from finetune_operator.observability import health as http
from finetune_operator.observability.health import Health, HealthSignals
from finetune_operator.reconcile.work_queue import Result, WorkQueue
from finetune_operator.settings import Settings

WATCHED = ("finetunejobs", "jobs", "pods")
WELL = HealthSignals(
    longest_wait=lambda: 0.0,
    longest_run=lambda: 0.0,
    heartbeat_age=lambda: 1.0,
    relist_age=lambda: 200.0,
    watch_ages=lambda: {("pods", "team"): 30.0},
    reachable=lambda: 100_000.0,
)


def problems(**signals: Any) -> list[str]:
    health = Health(replace(WELL, **signals), Settings(), heartbeat_seconds=10, watched=WATCHED)
    health.ready = True
    return health.problems()


async def asked(health: Health, path: str) -> tuple[int, str]:
    runner = await http.serve("127.0.0.1", 0, health, CollectorRegistry())
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession() as session, session.get(f"http://{host}:{port}{path}") as answer:
        found = answer.status, await answer.text()
    await runner.cleanup()
    return found


def test_a_queue_that_stands_still_is_a_500_with_its_sentences():
    async def hang(key: ObjectKey) -> Result:
        await asyncio.Event().wait()
        return Result()

    async def act() -> None:
        queue = WorkQueue(hang, workers=1)
        signals = replace(WELL, longest_wait=queue.longest_wait_seconds, longest_run=queue.longest_run_seconds)
        health = Health(signals, Settings(stuck_seconds=0.05), heartbeat_seconds=10, watched=WATCHED)
        work = asyncio.create_task(queue.run())
        assert await asked(health, "/healthz") == (200, "ok")
        queue.add(ObjectKey("FineTuneJob", "a", "b"))
        queue.add(ObjectKey("FineTuneJob", "a", "c"))
        await asyncio.sleep(0.2)
        code, text = await asked(health, "/healthz")
        assert code == 500
        assert text.splitlines() == [
            "work queue stuck: the oldest job has waited 0 s",
            "reconcile stuck: it has run for 0 s",
        ]
        work.cancel()

    asyncio.run(act())


def test_it_is_ready_when_it_has_seen_everything_once():
    async def act() -> None:
        health = Health(WELL, Settings(), heartbeat_seconds=10, watched=WATCHED)
        assert (await asked(health, "/readyz"))[0] == 503
        health.ready = True
        assert await asked(health, "/readyz") == (200, "ok")

    asyncio.run(act())


@pytest.mark.parametrize(
    ("signals", "said"),
    [
        ({}, []),
        ({"heartbeat_age": lambda: 31.0}, ["heartbeat late: the last one was 31 s ago"]),
        ({"relist_age": lambda: 901.0}, ["relist late: the last attempt was 901 s ago"]),
        (
            {"watch_ages": lambda: {("pods", "team"): 211.0, ("events/x", "team"): 999.0}},
            ["watch of pods in team dead: its last event or bookmark was 211 s ago"],
        ),
    ],
)
def test_what_is_late_is_said(signals: dict[str, Any], said: list[str]):
    assert problems(**signals) == said


def test_an_api_server_that_is_away_is_no_reason_to_restart():
    """Full lists are tried and fail, and no watch can live."""
    away: dict[str, Any] = {"relist_age": lambda: 5.0, "watch_ages": lambda: {("pods", ""): 5000.0}}
    assert problems(**away, reachable=lambda: 0.0) == []
    assert problems(**away, reachable=lambda: 60.0) == [], "nor one that has come back just now"
    assert problems(**away, reachable=lambda: 211.0) != []


def test_the_reach_of_the_api_server_is_counted_from_its_last_failure(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr("finetune_operator.kube.freshness.time.monotonic", lambda: now)
    reach = Reachability()
    assert reach.seconds() == 0
    reach.record_answer(200)
    now = 50
    reach.record_answer(404)
    assert reach.seconds() == 50
    for fail in (reach.record_failure, lambda: reach.record_answer(503), lambda: reach.record_answer(429)):
        fail()
        assert reach.seconds() == 0
        reach.record_answer(200)
        now += 10
        assert reach.seconds() == 10
