"""Chaos: the operator killed between any two of its API calls, an API that fails in every way it can, clocks that step.

The operator's own code runs in this process, Kopf included, against a real API server with the real Job controller,
through a proxy that does the harm; pods, Kueue and users are simulated. A "kill" abandons the operator at once: the
proxy lets nothing more through, and a new operator starts from nothing.

`make chaos` (FINETUNE_CHAOS=full) runs the same for longer, with more than 500 faults and kills.
"""

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from finetune_operator.main import Operator
from finetune_operator.observability import logs
from finetune_operator.reconcile.clock import Clock
from support.node.fake_kubelet import SimulatedKubelet
from support.operator.in_process import living
from support.server.client import AsyncKube
from support.server.fault_proxy import OF_WATCHES, OF_WRITES, ApiProxy
from support.server.server import Cluster
from support.simulation.stories import Chaos, Kueue

FULL = os.environ.get("FINETUNE_CHAOS") == "full"
#: Rounds of all stories; each costs the operator several dozen lives.
ROUNDS = 4 if FULL else 1
#: A life ends at one of its first so many writes.
WRITES_IN_A_LIFE = 3 if FULL else 5
KILLS = 200 if FULL else 20
FAULTS = 600 if FULL else 60
#: At least so many faults of each kind.
OF_EACH_KIND = 15 if FULL else 2
OUTAGE_SECONDS = 30 if FULL else 5
DAY = 86_400
CONVERGED_SECONDS = 60
#: The longest a test may go on, so that it always ends and says where it stood.
TEST_SECONDS = 1500 if FULL else 300


@pytest.fixture(autouse=True)
def plain_logs() -> None:
    """structlog's own default draws every traceback, which takes longer than the test."""
    logs.configure("critical")
    logging.getLogger("kopf").setLevel(logging.CRITICAL)


@pytest.fixture(autouse=True)
def needs_the_job_controller(cluster: Cluster) -> None:
    if not cluster.has_job_controller:
        pytest.skip("needs the real Job controller")


def play(cluster: Cluster, namespace: str, act: Callable[[Chaos], Awaitable[None]]) -> None:
    async def run() -> None:
        kube = AsyncKube(cluster.access)
        try:
            async with SimulatedKubelet(kube, namespace) as kubelet, Kueue(kube, namespace):
                chaos = Chaos(kube, namespace, kubelet)
                try:
                    async with asyncio.timeout(TEST_SECONDS):
                        await act(chaos)
                finally:
                    await chaos.stop()
        finally:
            await kube.close()

    asyncio.run(run())


async def converge(chaos: Chaos, operator: Operator) -> float:
    """Seconds until every story is at its end, once all harm is over."""
    began = time.monotonic()
    while left := await chaos.unfinished():
        waited = time.monotonic() - began
        if waited > CONVERGED_SECONDS:
            told = "\n".join(await chaos.explain(left))
            raise AssertionError(f"not over after {waited:.0f} s; {inside(operator)}:\n{told}")
        await asyncio.sleep(0.2)
    return time.monotonic() - began


def inside(operator: Operator) -> str:
    """Where an operator stands, for one that takes too long."""
    ages = {what: round(age) for (what, _), age in operator.connection.freshness.ages().items()}
    queue = operator.queue
    listed = f"the last list was {operator.relister.age():.0f} s ago"
    return f"{queue.depth} wait, {queue.delayed} are delayed, seconds since watches were heard: {ages}, {listed}"


def test_killed_before_and_after_every_write(cluster: Cluster, namespace: str):
    """Every life of the operator ends at one of its first writes, before or after the server has done it."""

    async def act(chaos: Chaos) -> None:
        for _ in range(ROUNDS):
            await chaos.create()
        counts: Counter[str] = Counter()
        lives = 0
        while (left := await chaos.unfinished()) or counts.total() < KILLS:
            if not left:
                await chaos.create()
            lives += 1
            assert lives < 1000, f"no end in sight: {await chaos.unfinished()}"
            async with ApiProxy(cluster.access, counts=counts) as proxy:
                proxy.die_at, proxy.dies_after_the_answer = 1 + lives % WRITES_IN_A_LIFE, lives % 2 == 0
                async with living(proxy, chaos.namespace):
                    with suppress(TimeoutError):
                        await asyncio.wait_for(proxy.dead.wait(), 3)
        async with ApiProxy(cluster.access) as proxy, living(proxy, chaos.namespace) as operator:
            seconds = await converge(chaos, operator)
        await chaos.assert_nothing_lost_or_doubled()
        print(
            f"{len(chaos.stories)} jobs, {counts.total()} kills {dict(counts)} in {lives} lives; {seconds:.1f} s after"
        )
        assert counts.total() >= KILLS
        assert min(counts.values()) >= KILLS / 3, "before and after"

    play(cluster, namespace, act)


class Harm:
    """What is done to the API and to the clocks, one thing after another, beside requests that fail at random."""

    def __init__(self, proxy: ApiProxy) -> None:
        self.proxy = proxy
        self.wall_off = 0.0
        self._random = random.Random(7)
        self._turn = 0

    def wall(self) -> float:
        """The wall clock of the operator's node."""
        return time.time() + self.wall_off

    async def next(self) -> None:
        proxy = self.proxy
        deeds = [
            lambda: self.step_wall(DAY),
            proxy.freeze_watches,
            proxy.cut_watches,
            lambda: proxy.expire_watches("410 event"),
            lambda: self.step_wall(0),
            lambda: self.step_server(DAY),
            lambda: proxy.expire_watches("410 status"),
            lambda: self.step_server(0),
            lambda: self.step_wall(-3600),
            proxy.cut_watches,
            lambda: self.step_wall(0),
        ]
        deeds[self._turn % len(deeds)]()
        self._turn += 1
        proxy.rate = self._random.choice([0.0, 0.2, 0.7])  # bursts
        await asyncio.sleep(1.0)

    def step_wall(self, seconds: float) -> None:
        self.wall_off = seconds
        self.proxy.counts["wall clock step"] += 1

    def step_server(self, seconds: float) -> None:
        self.proxy.date_skew = seconds
        self.proxy.counts["server clock step"] += 1

    def stop(self) -> None:
        self.proxy.thaw_watches()
        self.proxy.rate = self.proxy.date_skew = self.wall_off = 0.0


KINDS = {*OF_WATCHES, *OF_WRITES, "watch cut", "watch frozen", "wall clock step", "server clock step"}


@pytest.mark.skipif(not FULL, reason="takes minutes on a machine of its own: make chaos")
def test_an_api_that_fails_in_every_way_and_clocks_that_step(cluster: Cluster, namespace: str):
    async def act(chaos: Chaos) -> None:
        async with ApiProxy(cluster.access) as proxy:
            harm, rounds = Harm(proxy), 0
            async with living(proxy, chaos.namespace, Clock(harm.wall)) as operator:
                while proxy.counts.total() < FAULTS or min(proxy.counts[kind] for kind in KINDS) < OF_EACH_KIND:
                    if rounds % 12 == 0:
                        await chaos.create()
                    rounds += 1
                    assert rounds < 300, dict(proxy.counts)
                    await harm.next()
                    if rounds == 9:
                        await proxy.outage(OUTAGE_SECONDS)
                harm.stop()
                seconds = await converge(chaos, operator)
                assert operator.health.problems() == []
        print(f"{len(chaos.stories)} jobs, {dict(proxy.counts)}; over {seconds:.1f} s after the last")
        await chaos.assert_nothing_lost_or_doubled()

    play(cluster, namespace, act)
