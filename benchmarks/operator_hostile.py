"""What one tenant can cost the others: the largest jobs there can be, and ten thousand of them at once.

    python benchmarks/operator_hostile.py --largest 1000 --crowd 10000

Runs on a real kube-apiserver where its binaries are (else the stand-in, said so), without a Job controller: Jobs get no
pods, and the operator comes to rest. Server, operator and this program share the machine. `--largest` measures the
operator's memory; `--crowd` the time from the creation of another tenant's job to its Job: alone, while a namespace
with so many jobs fills, once it is full, and after a restart over all of them.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path

from operator_scale import METADATA_ONLY, Seen, manifest, session_of

from finetune_api import constants
from support.common.largest import largest_job
from support.operator.process import OperatorProcess, running
from support.server import server as clusters
from support.server.client import Access, AsyncKube, path_of

CREATORS = 8
SAMPLES = 20
#: A line each time so many are done.
PROGRESS = 250


class Clock:
    """Tells each stage as it ends, with the seconds it took."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def tell(self, stage: str) -> None:
        now = time.monotonic()
        print(f"  {now - self._since:6.0f} s  {stage}  (load average {os.getloadavg()[0]:.1f})", flush=True)
        self._since = now


async def create(access: Access, namespace: str, bodies: Iterable[dict[str, object]]) -> None:
    """Create them as fast as the server takes them."""
    waiting, made = iter(bodies), 0
    url = access.server + path_of(constants.KIND, namespace)
    headers = {"Content-Type": "application/json", "Accept": METADATA_ONLY}

    async with session_of(access) as session:

        async def work() -> None:
            nonlocal made
            for body in waiting:
                async with session.post(url, data=json.dumps(body), headers=headers) as answer:
                    answer.raise_for_status()
                    await answer.read()
                made += 1
                if made % PROGRESS == 0:
                    print(f"          {made} created", flush=True)

        await asyncio.gather(*(work() for _ in range(CREATORS)))


async def seen_by(operator: OperatorProcess, count: int) -> None:
    """Wait until the operator holds so many jobs and none waits for a worker."""
    told = 0
    while True:
        held = operator.metric("finetune_operator_cached_objects", kind=constants.KIND) or 0
        depth = operator.metric("finetune_operator_queue_depth") or 0
        if held >= count and depth == 0:
            return
        if int(held - depth) // PROGRESS > told:
            told = int(held - depth) // PROGRESS
            print(f"          {held:.0f} seen, {depth:.0f} wait", flush=True)
        await asyncio.sleep(1)


class Memory:
    """What memory a process has, and had at most, MiB, as the kernel counts it."""

    def __init__(self, operator: OperatorProcess) -> None:
        self._status = Path(f"/proc/{operator.process.pid}/status")

    def read(self, name: str) -> int:
        line = next(line for line in self._status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) // 1024

    def __str__(self) -> str:
        return f"{self.read('VmRSS')} MiB, {self.read('VmHWM')} MiB at most"


def largest(count: int) -> Iterator[dict[str, object]]:
    for number in range(count):
        job = largest_job(f"job-{number}")
        del job["spec"]["image"]  # refused by the default policy
        yield job


def server_kind() -> str:
    return clusters.APISERVER if clusters.APISERVER in clusters.available() else clusters.STANDIN


def run_largest(count: int) -> None:
    kind = server_kind()
    folder = Path(tempfile.mkdtemp(prefix="finetune-bench-"))
    with clusters.start(kind) as cluster, cluster.namespace("bench") as namespace:
        clock = Clock()
        print(f"{count} of the largest jobs, {clusters.describe(kind)}", flush=True)
        with running(cluster.kubeconfig, folder / "first", {"namespaces": [namespace]}) as operator:
            clock.tell(f"operator started: {Memory(operator)}")
            asyncio.run(create(cluster.access, namespace, largest(count)))
            clock.tell(f"all created: {Memory(operator)}")
            asyncio.run(seen_by(operator, count))
            clock.tell(f"each reconciled: {Memory(operator)}")
        with running(cluster.kubeconfig, folder / "second", {"namespaces": [namespace]}) as operator:
            asyncio.run(seen_by(operator, count))
            clock.tell(f"each reconciled after a restart: {Memory(operator)}")


async def measure_delay(cluster: clusters.Cluster, small: str, seen: Seen, first: int) -> list[float]:
    """Seconds from creation to the Job, for some jobs of the small tenant."""
    kube, waits = AsyncKube(cluster.access), []
    for number in range(first, first + SAMPLES):
        began = time.monotonic()
        await kube.request("POST", path_of(constants.KIND, small), manifest(f"small-{number}"))
        async with asyncio.timeout(120):
            while f"small-{number}" not in seen.jobs:
                seen.changed.clear()
                await seen.changed.wait()
        waits.append(seen.jobs[f"small-{number}"] - began)
        await asyncio.sleep(0.5)
    await kube.close()
    return waits


def told(waits: list[float]) -> str:
    return f"{statistics.median(waits):.2f} s in the median of {len(waits)}, {max(waits):.2f} s at most"


async def measure_crowd(
    cluster: clusters.Cluster, operator: OperatorProcess, crowd: str, small: str, count: int, seen: Seen, clock: Clock
) -> None:
    waits = await measure_delay(cluster, small, seen, 0)
    clock.tell(f"alone: {told(waits)}")
    filling = asyncio.create_task(create(cluster.access, crowd, (manifest(f"job-{number}") for number in range(count))))
    await asyncio.sleep(3)
    waits = await measure_delay(cluster, small, seen, SAMPLES)
    clock.tell(f"while it fills: {told(waits)}")
    await filling
    clock.tell(f"all created; {operator.metric('finetune_operator_queue_depth'):.0f} wait")
    waits = await measure_delay(cluster, small, seen, 2 * SAMPLES)
    clock.tell(f"once it is full: {told(waits)}")
    await seen_by(operator, count)
    clock.tell("each reconciled")


async def with_seen(cluster: clusters.Cluster, small: str, act: Callable[[Seen], Awaitable[None]]) -> None:
    seen = Seen(cluster.access, small)
    follower = asyncio.create_task(seen.follow("Job"))
    await asyncio.sleep(1)
    await act(seen)
    follower.cancel()
    await asyncio.gather(follower, return_exceptions=True)


def run_crowd(count: int) -> None:
    kind = server_kind()
    folder = Path(tempfile.mkdtemp(prefix="finetune-bench-"))
    with (
        clusters.start(kind) as cluster,
        cluster.namespace("crowd") as crowd,
        cluster.namespace("small") as small,
    ):
        clock, settings = Clock(), {"namespaces": [crowd, small]}
        print(f"{count} jobs of another tenant, {clusters.describe(kind)}", flush=True)
        with running(cluster.kubeconfig, folder / "first", settings) as operator:
            clock.tell("operator started")
            asyncio.run(
                with_seen(
                    cluster, small, lambda seen: measure_crowd(cluster, operator, crowd, small, count, seen, clock)
                )
            )

        async def after_restart(seen: Seen) -> None:
            waits = await measure_delay(cluster, small, seen, 3 * SAMPLES)
            clock.tell(f"after a restart, all of them queued: {told(waits)}")

        with running(cluster.kubeconfig, folder / "second", settings) as operator:
            clock.tell(f"restarted; {operator.metric('finetune_operator_queue_depth'):.0f} wait")
            asyncio.run(with_seen(cluster, small, after_restart))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=0, help="so many of the largest jobs")
    parser.add_argument("--crowd", type=int, default=0, help="so many jobs in one namespace")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}", flush=True)
    if options.largest:
        run_largest(options.largest)
    if options.crowd:
        run_crowd(options.crowd)


if __name__ == "__main__":
    sys.exit(main())
