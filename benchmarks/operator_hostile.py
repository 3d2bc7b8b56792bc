"""What one tenant can cost the others: the largest jobs there can be, and ten thousand of them at once.

    python benchmarks/operator_hostile.py --largest 1000 --crowd 10000

Runs on a real kube-apiserver where its binaries are (else the stand-in, said so). Server, operator and this program
share the machine. `--largest` measures the operator's memory; `--crowd` the time from the creation of another tenant's
first job to its Job, while a namespace with so many jobs fills, and after each job of it was queued at once.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
from operator_scale import METADATA_ONLY, Seen, manifest, session_of, until

from finetune_api import constants
from support.common.largest import largest_job
from support.operator.process import OperatorProcess, running
from support.server import server as clusters
from support.server.client import Access, AsyncKube, path_of

CREATORS = 8
SAMPLES = 20


async def create(access: Access, namespace: str, bodies: list[dict[str, object]]) -> None:
    """Create them as fast as the server takes them."""
    waiting = iter(bodies)
    url = access.server + path_of(constants.KIND, namespace)
    headers = {"Content-Type": "application/json", "Accept": METADATA_ONLY}

    async with session_of(access) as session:

        async def work() -> None:
            for body in waiting:
                async with session.post(url, data=json.dumps(body), headers=headers) as answer:
                    answer.raise_for_status()
                    await answer.read()

        await asyncio.gather(*(work() for _ in range(CREATORS)))


class Memory:
    """The most memory that a process was seen to have, MiB."""

    def __init__(self, operator: OperatorProcess) -> None:
        self._process, self.most = psutil.Process(operator.process.pid), 0.0

    def now(self) -> float:
        return self._process.memory_info().rss / 2**20

    async def watch(self) -> None:
        while True:
            self.most = max(self.most, self.now())
            await asyncio.sleep(0.1)


async def measure_memory(cluster: clusters.Cluster, operator: OperatorProcess, namespace: str, count: int) -> None:
    memory = Memory(operator)
    watch = asyncio.create_task(memory.watch())
    before = memory.now()
    bodies = []
    for number in range(count):
        job = largest_job(f"job-{number}")
        del job["spec"]["image"]  # refused by the default policy
        bodies.append(job)
    await create(cluster.access, namespace, bodies)
    await asyncio.sleep(5)
    await until(operator, "finetune_operator_queue_depth")
    print(f"  {before:.0f} MiB before, {memory.now():.0f} MiB after, {memory.most:.0f} MiB at most")
    watch.cancel()


def run_largest(count: int) -> None:
    kind = clusters.chosen()
    folder = Path(tempfile.mkdtemp(prefix="finetune-bench-"))
    with clusters.start(kind) as cluster, cluster.namespace("bench") as namespace:
        print(f"{count} of the largest jobs, {clusters.describe(kind)}", flush=True)
        with running(cluster.kubeconfig, folder / "first", {"namespaces": [namespace]}) as operator:
            asyncio.run(measure_memory(cluster, operator, namespace, count))
        with running(cluster.kubeconfig, folder / "second", {"namespaces": [namespace]}) as operator:
            memory = Memory(operator)
            operator.wait_idle(300)
            time.sleep(10)
            peak = next(
                line
                for line in Path(f"/proc/{operator.process.pid}/status").read_text().splitlines()
                if "VmHWM" in line
            )
            print(
                f"  a restart over them: {memory.now():.0f} MiB, {int(peak.split()[1]) / 1024:.0f} MiB at most",
                flush=True,
            )


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


async def measure_crowd(
    cluster: clusters.Cluster, operator: OperatorProcess, crowd: str, small: str, count: int
) -> None:
    seen = Seen(cluster.access, small)
    followers = [asyncio.create_task(seen.follow("Job"))]
    await asyncio.sleep(1)
    filling = asyncio.create_task(create(cluster.access, crowd, [manifest(f"job-{number}") for number in range(count)]))
    await asyncio.sleep(3)
    waits = await measure_delay(cluster, small, seen, 0)
    print(
        f"  while it fills: {max(waits):.2f} s at most, depth {operator.metric('finetune_operator_queue_depth')}",
        flush=True,
    )
    await filling
    depth = operator.metric("finetune_operator_queue_depth")
    waits = await measure_delay(cluster, small, seen, SAMPLES)
    print(f"  once it is full: {max(waits):.2f} s at most, from a depth of {depth}", flush=True)
    for follower in followers:
        follower.cancel()
    await asyncio.gather(*followers, return_exceptions=True)


def run_crowd(count: int) -> None:
    kind = clusters.chosen()
    folder = Path(tempfile.mkdtemp(prefix="finetune-bench-"))
    with (
        clusters.start(kind) as cluster,
        cluster.namespace("crowd") as crowd,
        cluster.namespace("small") as small,
        running(cluster.kubeconfig, folder, {"namespaces": [crowd, small]}) as operator,
    ):
        print(f"{count} jobs of another tenant, {clusters.describe(kind)}", flush=True)
        asyncio.run(measure_crowd(cluster, operator, crowd, small, count))


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
