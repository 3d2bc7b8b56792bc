"""How the operator scales: thousands of FineTuneJobs on a real kube-apiserver (or the stand-in, said so).

    python benchmarks/operator_scale.py --jobs 1000 --jobs 5000 --runs 3

Server, operator and this program share the machine. Jobs get no pods, for there is no Job controller. What is measured
is compared with the limits of rangespec.yaml, which also records mean and spread of earlier runs (as Kueue's
performance tests do); exit code 1 when a limit is passed.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support import cluster as clusters  # noqa: E402
from support.kube import AsyncKube, path_of  # noqa: E402
from support.operator_process import OperatorProcess, running  # noqa: E402

RANGESPEC = Path(__file__).with_name("rangespec.yaml")
CREATORS = 32
LATENCY_SAMPLES = 100
REST_SECONDS = 20
Figures = dict[str, float]


def manifest(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
            "dataset": {"train": "s3://data/nli/train_ft.jsonl", "eval": "s3://data/nli/test_ft.jsonl"},
            "output": {"uri": f"s3://adapters/{name}", "secretRef": {"name": "s3"}},
        },
    }


class Seen:
    """When each job had its Job, and when its status; read from watches."""

    def __init__(self, kube: AsyncKube, namespace: str) -> None:
        self._kube, self._namespace = kube, namespace
        self.jobs: dict[str, float] = {}
        self.statuses: dict[str, float] = {}
        self.changed = asyncio.Event()

    async def follow(self, kind: str) -> None:
        path = path_of(kind, self._namespace)
        since = (await self._kube.request("GET", path, params={"limit": "1"}))["metadata"]["resourceVersion"]
        while True:
            async with aclosing(self._kube.watch(path, since)) as events:
                async for event in events:
                    since = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        self._note(kind, event["object"])

    def _note(self, kind: str, obj: dict[str, Any]) -> None:
        if kind == "Job":
            self.jobs.setdefault(obj["metadata"]["labels"]["finetune.dev/job"], time.monotonic())
        elif (obj.get("status") or {}).get("conditions"):
            self.statuses.setdefault(obj["metadata"]["name"], time.monotonic())
        self.changed.set()

    async def wait_for(self, count: int, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            while min(len(self.jobs), len(self.statuses)) < count:
                self.changed.clear()
                await self.changed.wait()


async def create(kube: AsyncKube, namespace: str, names: list[str]) -> None:
    """Create them as fast as the server takes them."""
    waiting = iter(names)
    path = path_of("FineTuneJob", namespace)

    async def work() -> None:
        for name in waiting:
            await kube.request("POST", path, manifest(name))

    await asyncio.gather(*(work() for _ in range(CREATORS)))


def writes(operator: OperatorProcess) -> float:
    verbs = ("create", "patch", "delete")
    return sum(operator.metric("finetune_operator_api_requests_total", verb=verb) or 0 for verb in verbs)


async def events_posted(operator: OperatorProcess) -> None:
    """Events are posted beside the reconciles; wait until no more come."""
    for _ in range(100):
        before = writes(operator)
        await asyncio.sleep(5)
        if writes(operator) == before:
            return


def calls(operator: OperatorProcess) -> float:
    """Requests other than watches and the regular lists."""
    total = operator.metric("finetune_operator_api_requests_total") or 0
    return total - sum(operator.metric("finetune_operator_api_requests_total", verb=v) or 0 for v in ("watch", "list"))


async def measure(cluster: clusters.Cluster, operator: OperatorProcess, namespace: str, count: int) -> Figures:
    """One run with `count` jobs. Seconds, MiB and numbers; see rangespec.yaml for what each is."""
    kube = AsyncKube(cluster.access)
    process = psutil.Process(operator.process.pid)
    seen = Seen(kube, namespace)
    followers = [asyncio.create_task(seen.follow(kind)) for kind in ("FineTuneJob", "Job")]
    await asyncio.sleep(1)
    latencies = []
    for number in range(LATENCY_SAMPLES):
        name = f"idle-{number}"
        began = time.monotonic()
        await kube.request("POST", path_of("FineTuneJob", namespace), manifest(name))
        await seen.wait_for(number + 1, 60)
        latencies.append(seen.jobs[name] - began)
    before, cpu_before, began = writes(operator), sum(process.cpu_times()[:2]), time.monotonic()
    await create(kube, namespace, [f"job-{number}" for number in range(count)])
    created = time.monotonic()
    await seen.wait_for(count + LATENCY_SAMPLES, 1200)
    figures = {
        "create_seconds": created - began,
        "converge_seconds": max(max(seen.jobs.values()), max(seen.statuses.values())) - began,
        "operator_cpu_seconds": sum(process.cpu_times()[:2]) - cpu_before,
        "latency_p50_seconds": statistics.median(latencies),
        "latency_p99_seconds": statistics.quantiles(latencies, n=100)[98],
    }
    while (operator.metric("finetune_operator_queue_depth") or 0) > 0:  # noqa: ASYNC110 (another process's metric)
        await asyncio.sleep(0.5)
    await events_posted(operator)
    figures["resident_mebibytes"] = process.memory_info().rss / 2**20
    figures["writes_per_job"] = (writes(operator) - before) / count
    at_rest = calls(operator)
    await asyncio.sleep(REST_SECONDS)
    figures["calls_at_rest"] = calls(operator) - at_rest
    for follower in followers:
        follower.cancel()
    await asyncio.gather(*followers, return_exceptions=True)
    await kube.close()
    return figures


def restart(cluster: clusters.Cluster, folder: Path, namespace: str) -> Figures:
    """A new operator over everything that is there."""
    began = time.monotonic()
    with running(cluster.kubeconfig, folder, {"namespaces": [namespace]}) as operator:
        operator.wait_idle(300)
        seconds = time.monotonic() - began
        time.sleep(5)
        memory = psutil.Process(operator.process.pid).memory_info().rss / 2**20
        return {
            "restart_seconds": seconds,
            "restart_resident_mebibytes": memory,
            "restart_writes": writes(operator),
        }


def run(count: int) -> tuple[Figures, str]:
    """One run on a fresh server; its figures and which server it was."""
    kind = "apiserver" if "apiserver" in clusters.available() else clusters.STANDIN
    folder = Path(tempfile.mkdtemp(prefix="finetune-bench-"))
    with clusters.start(kind) as cluster, cluster.namespace("bench") as namespace:
        with running(cluster.kubeconfig, folder / "first", {"namespaces": [namespace]}) as operator:
            figures = asyncio.run(measure(cluster, operator, namespace, count))
        figures |= restart(cluster, folder / "second", namespace)
        return figures, clusters.describe(kind)


def compare(count: int, runs: list[Figures], limits: dict[str, Any]) -> bool:
    """Print mean, spread, goal and limit of every figure; whether all are within their limits."""
    well = True
    for name in runs[0]:
        values = [figures[name] for figures in runs]
        mean, spread = statistics.mean(values), max(values) - min(values)
        limit = limits.get(name, {})
        passed = mean <= limit.get("limit", float("inf"))
        well &= passed
        goal = f"goal {limit['goal']:g}" if "goal" in limit else ""
        verdict = "" if passed else f"  LIMIT {limit['limit']:g} PASSED"
        print(f"  {name:28} {mean:10.3f}  spread {spread:8.3f}  {goal}{verdict}")
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, action="append", help="number of jobs; give it several times for several")
    parser.add_argument("--runs", type=int, default=1, help="runs for mean and spread")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    spec = yaml.safe_load(RANGESPEC.read_text())
    well, record = True, {}
    for count in options.jobs or [1000, 5000]:
        print(f"{count} jobs, {options.runs} run(s), {os.cpu_count()} cores, {platform.machine()}", flush=True)
        results = [run(count) for _ in range(options.runs)]
        print(f"  server: {results[0][1]}; load average {os.getloadavg()[0]:.1f}")
        runs = [figures for figures, _ in results]
        well &= compare(count, runs, spec["ranges"].get(count, {}))
        record[count] = runs
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
