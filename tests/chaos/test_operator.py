"""Chaos: the operator killed between any two of its API calls, and an API that fails in every way it can.

The operator's own code runs in this process, Kopf included, against a real API server with the real Job controller,
through a proxy that does the harm; pods are simulated. A "kill" abandons the operator at once: the proxy lets nothing
more through, and a new operator starts from nothing.
"""

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from kubernetes.aio.client import Configuration

from finetune_operator import logs
from finetune_operator.clock import Clock
from finetune_operator.main import Operator
from finetune_operator.metrics import Metrics
from finetune_operator.session import Connection
from finetune_operator.settings import Settings
from support.api_proxy import ApiProxy
from support.cluster import Cluster
from support.kube import AsyncKube, path_of
from support.operator_fixtures import manifest
from support.simulated_kubelet import SimulatedKubelet

#: Rounds of all stories in the test of kills; each costs the operator about 40 lives.
ROUNDS = int(os.environ.get("FINETUNE_CHAOS_ROUNDS", "1"))

FAULTS = 500

#: story -> how its attempts end
STORIES: dict[str, list[str]] = {
    "succeed": ["Succeeded"],
    "fail-65": ["DatasetInvalid"],
    "fail-69/succeed": ["Unavailable", "Succeeded"],
    "oom/succeed": ["GpuOutOfMemory", "Succeeded"],
    "fail-75/fail-75/succeed": ["Preempted", "Preempted", "Succeeded"],
    "fail-69/oom/fail-69/succeed": ["Unavailable", "GpuOutOfMemory", "Unavailable", "Succeeded"],
    "oom/fail-91": ["GpuOutOfMemory", "Diverged"],
}


@pytest.fixture(autouse=True)
def plain_logs() -> None:
    logs.configure("critical")  # structlog's own default draws every traceback, which takes longer than the test
    logging.getLogger("kopf").setLevel(logging.CRITICAL)


@pytest.fixture(autouse=True)
def needs_the_job_controller(cluster: Cluster) -> None:
    if not cluster.has_job_controller:
        pytest.skip("needs the real Job controller")


@asynccontextmanager
async def living(proxy: ApiProxy, namespace: str, clock: Clock | None = None) -> AsyncIterator[Operator]:
    """An operator behind the proxy; at the end it is abandoned as it stands."""
    configuration = Configuration()
    configuration.host = proxy.url
    configuration.api_key = {"BearerToken": f"Bearer {proxy.access.token}"}
    metrics = Metrics()
    settings = Settings(namespaces=(namespace,), request_timeout_seconds=5, kueue="disabled", start_timeout_seconds=600)
    operator = Operator(settings, Connection(configuration, metrics), metrics, clock)
    me = asyncio.current_task()
    assert me is not None
    work = asyncio.create_task(operator.work())
    # When the operator gives up by itself, so does the test.
    work.add_done_callback(lambda ended: ended.cancelled() or proxy.dead.is_set() or me.cancel(repr(ended.exception())))
    try:
        yield operator
    finally:
        work.cancel()
        await asyncio.wait({work}, timeout=5)
        await operator.session.close()


class Chaos:
    """The jobs of one test, and what became of them."""

    def __init__(self, kube: AsyncKube, namespace: str) -> None:
        self.kube, self.namespace = kube, namespace
        self.expected: dict[str, list[str]] = {}

    async def create(self, rounds: int) -> None:
        for _ in range(rounds):
            for story, ends in STORIES.items():
                name = f"job-{len(self.expected)}"
                body = manifest(name, story, recovery={"backoffSeconds": 0, "maxAttempts": 10})
                await self.kube.request("POST", path_of("FineTuneJob", self.namespace), body)
                self.expected[name] = ends

    async def statuses(self) -> dict[str, dict[str, Any]]:
        found = await self.kube.request("GET", path_of("FineTuneJob", self.namespace))
        return {job["metadata"]["name"]: job.get("status") or {} for job in found["items"]}

    async def unfinished(self) -> list[str]:
        over = ("Succeeded", "Failed")
        return [name for name, status in (await self.statuses()).items() if status.get("phase") not in over]

    async def wait_until_over(self, seconds: float) -> float:
        """Seconds until every job was over."""
        began = time.monotonic()
        while left := await self.unfinished():
            assert time.monotonic() - began < seconds, f"not over after {seconds:g} s: {left}"
            await asyncio.sleep(0.2)
        return time.monotonic() - began

    async def assert_nothing_lost_or_doubled(self, kubelet: SimulatedKubelet) -> None:
        statuses = await self.statuses()
        told = {name: [a.get("reason") for a in status["attempts"]] for name, status in statuses.items()}
        assert told == self.expected
        assert kubelet.violations == [], "two attempts of a job could run at once"
        twice = {name: uids for name, uids in kubelet.made.items() if len(uids) > 1}
        assert twice == {}, "an attempt was made twice"
        assert len(kubelet.made) == sum(map(len, self.expected.values()))


def play(cluster: Cluster, namespace: str, act: Callable[[Chaos, SimulatedKubelet], Awaitable[None]]) -> None:
    async def run() -> None:
        kube = AsyncKube(cluster.access)
        try:
            async with SimulatedKubelet(kube, namespace) as kubelet:
                await act(Chaos(kube, namespace), kubelet)
        finally:
            await kube.close()

    asyncio.run(run())


def test_killed_before_and_after_every_write(cluster: Cluster, namespace: str):
    """Every life of the operator ends at its first, second or third write, before or after the server has done it."""

    async def act(chaos: Chaos, kubelet: SimulatedKubelet) -> None:
        await chaos.create(rounds=ROUNDS)
        counts: Counter[str] = Counter()
        lives = 0
        while await chaos.unfinished():
            lives += 1
            assert lives < 400 * ROUNDS, f"no end in sight: {await chaos.unfinished()}"
            async with ApiProxy(cluster.access, counts=counts) as proxy:
                proxy.die_at, proxy.dies_after_the_answer = 1 + lives % 3, lives % 2 == 0
                async with living(proxy, chaos.namespace):
                    with suppress(TimeoutError):
                        await asyncio.wait_for(proxy.dead.wait(), 3)
        await chaos.assert_nothing_lost_or_doubled(kubelet)
        print(f"kills: {counts.total()} in {lives} lives: {dict(counts)}")
        assert counts.total() >= 30 * ROUNDS

    play(cluster, namespace, act)


@pytest.mark.skipif("FINETUNE_CHAOS_ROUNDS" not in os.environ, reason="takes minutes: set FINETUNE_CHAOS_ROUNDS=1")
def test_an_api_that_fails_in_every_way(cluster: Cluster, namespace: str):
    """Every third request fails, watches are cut or told 410, the API is away, the clock steps to and fro."""

    async def act(chaos: Chaos, kubelet: SimulatedKubelet) -> None:
        noise = random.Random(7)
        clock = Clock(lambda: time.time() + noise.choice([0, 0, 0, -3600, 30]))
        async with ApiProxy(cluster.access) as proxy, living(proxy, chaos.namespace, clock) as operator:
            rounds = 0
            proxy.rate = 0.3
            while proxy.counts.total() < FAULTS:
                rounds += 1
                assert rounds < 60, dict(proxy.counts)
                await chaos.create(rounds=1)
                await asyncio.sleep(1.0)
                proxy.cut_watches()
                if rounds == 3:
                    proxy.away = True
                    await asyncio.sleep(30)
                    proxy.away = False
            proxy.rate = 0.0
            seconds = await chaos.wait_until_over(60)
            assert operator.health.problems() == []
        print(f"faults: {proxy.counts.total()} {dict(proxy.counts)}; over {seconds:.1f} s after the last")
        await chaos.assert_nothing_lost_or_doubled(kubelet)

    play(cluster, namespace, act)
