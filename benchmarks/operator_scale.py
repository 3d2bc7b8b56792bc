"""How the operator scales: thousands of FineTuneJobs on a real kube-apiserver (or the stand-in, said so).

    python benchmarks/operator_scale.py --jobs 1000 --jobs 5000 --runs 3

Server, operator and this program share the machine. In the large runs jobs get no pods, for there is no Job controller;
what whole lives cost is measured with a hundred jobs more, the real Job controller and a simulated kubelet. Everything
is compared with the limits of rangespec.yaml, which also records mean and spread of earlier runs (as Kueue's
performance tests do); exit code 1 when a limit is passed.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import ssl
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from finetune_api import constants
from finetune_operator.kube.requests import METADATA_ONLY

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.node.fake_kubelet import SimulatedKubelet  # noqa: E402
from support.operator.process import OperatorProcess, running  # noqa: E402
from support.server import server as clusters  # noqa: E402
from support.server.client import Access, AsyncKube, path_of  # noqa: E402

RANGESPEC = Path(__file__).with_name("rangespec.yaml")
CREATORS = 32
LATENCY_SAMPLES = 100
REST_SECONDS = 20
JOB_LABEL = re.compile(rb'"finetune\.dev/job":"([^"]+)"')
NAME = re.compile(rb'"name":"([^"]+)","namespace":"')
LIVES = 100
#: As in production; tests look at trainers more often.
SETTINGS = {"progress_interval_seconds": 15}
WRITES = ("create", "patch", "update", "delete")
REQUESTS = "finetune_operator_api_requests_total"
Figures = dict[str, float]


def manifest(name: str, train: str = "s3://data/nli/train_ft.jsonl") -> dict[str, Any]:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
            "dataset": {"train": train, "eval": "s3://data/nli/test_ft.jsonl"},
            "output": {"uri": f"s3://adapters/{name}", "secretRef": {"name": "s3"}},
        },
    }


def session_of(access: Access) -> aiohttp.ClientSession:
    tls = ssl.create_default_context(cafile=str(access.ca_file)) if access.ca_file else True
    headers = {"Authorization": f"Bearer {access.token}"} if access.token else {}
    connector = aiohttp.TCPConnector(ssl=tls, limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=700)
    return aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout, read_bufsize=2**22)


class Seen:
    """When each job had its Job, and when its status; read from watches.

    Lines are searched, not decoded: this program shares two cores with what it measures.
    """

    def __init__(self, access: Access, namespace: str) -> None:
        self._access, self._namespace = access, namespace
        self.jobs: dict[str, float] = {}
        self.statuses: dict[str, float] = {}
        self.changed = asyncio.Event()
        self._lost: Exception | None = None

    async def follow(self, kind: str) -> None:
        """For ever; a watch that ends begins anew with the present state."""
        try:
            await self._follow(kind)
        except Exception as error:  # whoever waits is told: nothing more will be seen
            self._lost = error
            self.changed.set()

    async def _follow(self, kind: str) -> None:
        url = self._access.server + path_of(kind, self._namespace)
        query = {"watch": "1", "resourceVersion": "0", "timeoutSeconds": "600"}
        async with session_of(self._access) as session:
            while True:
                async with session.get(url, params=query) as answer:
                    answer.raise_for_status()
                    async for line in answer.content:
                        self._note(kind, line)

    def _note(self, kind: str, line: bytes) -> None:
        if kind == "Job" and (found := JOB_LABEL.search(line)):
            self.jobs.setdefault(found[1].decode(), time.monotonic())
        elif kind == constants.KIND and b'"conditions":[' in line and (found := NAME.search(line)):
            self.statuses.setdefault(found[1].decode(), time.monotonic())
        self.changed.set()

    async def wait_for(self, count: int, seconds: float) -> None:
        """Raises SystemExit when the server is gone, or after `seconds`."""
        why = f"not within {seconds:g} s"
        try:
            async with asyncio.timeout(seconds):
                while min(len(self.jobs), len(self.statuses)) < count and not self._lost:
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            pass
        else:
            if not self._lost:
                return
            why = f"a watch failed: {self._lost or type(self._lost).__name__}"
        raise SystemExit(f"of {count}, {len(self.jobs)} have their Job and {len(self.statuses)} their status; {why}")


async def create(access: Access, namespace: str, jobs: list[str]) -> None:
    """Create them as fast as the server takes them."""
    waiting = iter(jobs)
    url = access.server + path_of(constants.KIND, namespace)
    headers = {"Content-Type": "application/json", "Accept": METADATA_ONLY}

    async def work(session: aiohttp.ClientSession) -> None:
        for name in waiting:
            async with session.post(url, data=json.dumps(manifest(name)), headers=headers) as answer:
                answer.raise_for_status()
                await answer.read()

    async with session_of(access) as session:
        await asyncio.gather(*(work(session) for _ in range(CREATORS)))


def writes(operator: OperatorProcess) -> float:
    return sum(operator.metric(REQUESTS, verb=verb) or 0 for verb in WRITES)


def calls(operator: OperatorProcess) -> float:
    """Return requests other than watches and the regular lists."""
    total = operator.metric(REQUESTS) or 0
    return total - sum(operator.metric(REQUESTS, verb=verb) or 0 for verb in ("watch", "list"))


async def until(operator: OperatorProcess, metric: str) -> None:
    """Wait until a gauge of the operator is 0."""
    while (operator.metric(metric) or 0) > 0:  # noqa: ASYNC110 (another process's metric)
        await asyncio.sleep(0.5)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return float(sum(sum(process.cpu_times()[:2]) for process in processes))


def servers(cluster: clusters.Cluster) -> list[psutil.Process]:
    """Find etcd and kube-apiserver (or the stand-in): their folder is in their command lines."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if str(cluster.folder) in " ".join(process.info["cmdline"] or [])]


async def measure(cluster: clusters.Cluster, operator: OperatorProcess, namespace: str, count: int) -> Figures:
    """One run with `count` jobs. Seconds, MiB and numbers; see rangespec.yaml for what each is."""
    kube = AsyncKube(cluster.access)
    process = psutil.Process(operator.process.pid)
    seen = Seen(cluster.access, namespace)
    followers = [asyncio.create_task(seen.follow(kind)) for kind in (constants.KIND, "Job")]
    await asyncio.sleep(1)
    latencies = []
    for number in range(LATENCY_SAMPLES):
        name = f"idle-{number}"
        began = time.monotonic()
        await kube.request("POST", path_of("FineTuneJob", namespace), manifest(name))
        await seen.wait_for(number + 1, 60)
        latencies.append(seen.jobs[name] - began)
    before, calls_before, began = writes(operator), calls(operator), time.monotonic()
    every = {"operator": [process], "server": servers(cluster), "benchmark": [psutil.Process()]}
    cpu_before = {name: cpu_seconds(found) for name, found in every.items()}
    await create(cluster.access, namespace, [f"job-{number}" for number in range(count)])
    created = time.monotonic()
    await seen.wait_for(count + LATENCY_SAMPLES, 1200)
    figures = {
        "create_seconds": created - began,
        "converge_seconds": max(max(seen.jobs.values()), max(seen.statuses.values())) - began,
        "latency_p50_seconds": statistics.median(latencies),
        "latency_p99_seconds": statistics.quantiles(latencies, n=100)[98],
    }
    await until(operator, "finetune_operator_queue_depth")
    await until(operator, "finetune_operator_events_waiting")
    figures["events_posted_seconds"] = time.monotonic() - began
    for name, found in every.items():
        figures[f"{name}_cpu_ms_per_job"] = 1000 * (cpu_seconds(found) - cpu_before[name]) / count
    figures["resident_mebibytes"] = process.memory_info().rss / 2**20
    figures["writes_per_job"] = (writes(operator) - before) / count
    figures["calls_per_job"] = (calls(operator) - calls_before) / count
    figures["events_dropped"] = operator.metric("finetune_operator_events_dropped_total") or 0
    at_rest = calls(operator)
    await asyncio.sleep(REST_SECONDS)
    figures["calls_at_rest"] = calls(operator) - at_rest
    for follower in followers:
        follower.cancel()
    await asyncio.gather(*followers, return_exceptions=True)
    await kube.close()
    return figures


def restart(cluster: clusters.Cluster, folder: Path, namespace: str) -> Figures:
    """Start a new operator over everything that is there."""
    began = time.monotonic()
    with running(cluster.kubeconfig, folder, SETTINGS | {"namespaces": [namespace]}) as operator:
        operator.wait_idle(300)
        seconds = time.monotonic() - began
        time.sleep(5)
        memory = psutil.Process(operator.process.pid).memory_info().rss / 2**20
        return {
            "restart_seconds": seconds,
            "restart_resident_mebibytes": memory,
            "restart_writes": writes(operator),
        }


async def all_succeeded(kube: AsyncKube, path: str) -> bool:
    jobs = (await kube.request("GET", path))["items"]
    return all((job.get("status") or {}).get("phase") == "Succeeded" for job in jobs)


async def live(cluster: clusters.Cluster, operator: OperatorProcess, namespace: str) -> Figures:
    """Whole lives, from creation to success, of jobs whose pods a simulated kubelet plays."""
    kube = AsyncKube(cluster.access)
    path = path_of("FineTuneJob", namespace)
    process = psutil.Process(operator.process.pid)
    before, calls_before, cpu_before = writes(operator), calls(operator), cpu_seconds([process])
    async with SimulatedKubelet(kube, namespace, seconds=2):
        for number in range(LIVES):
            await kube.request("POST", path, manifest(f"life-{number}", "s3://simulated/succeed"))
        async with asyncio.timeout(600):
            while not await all_succeeded(kube, path):  # noqa: ASYNC110 (another process's state)
                await asyncio.sleep(1)
    await until(operator, "finetune_operator_events_waiting")
    await kube.close()
    return {
        "writes_in_a_life": (writes(operator) - before) / LIVES,
        "calls_in_a_life": (calls(operator) - calls_before) / LIVES,
        "operator_cpu_ms_in_a_life": 1000 * (cpu_seconds([process]) - cpu_before) / LIVES,
    }


def run(count: int) -> tuple[Figures, str]:
    """One run on a fresh server; its figures and which server it was."""
    kind = "apiserver" if "apiserver" in clusters.available() else clusters.STANDIN
    folder = Path(tempfile.mkdtemp(prefix="finetune-bench-"))
    with clusters.start(kind) as cluster, cluster.namespace("bench") as namespace:
        with running(cluster.kubeconfig, folder / "first", SETTINGS | {"namespaces": [namespace]}) as operator:
            figures = asyncio.run(measure(cluster, operator, namespace, count))
        figures |= restart(cluster, folder / "second", namespace)
        return figures, clusters.describe(kind)


def run_lives() -> Figures:
    """Whole lives, where there is a Job controller; nothing where there is none."""
    if clusters.CONTROLLERS not in clusters.available():
        return {}
    folder = Path(tempfile.mkdtemp(prefix="finetune-bench-"))
    with (
        clusters.start(clusters.CONTROLLERS) as cluster,
        cluster.namespace("bench") as namespace,
        running(cluster.kubeconfig, folder, SETTINGS | {"namespaces": [namespace]}) as operator,
    ):
        return asyncio.run(live(cluster, operator, namespace))


def compare(runs: list[Figures], limits: dict[str, Any]) -> bool:
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
    well, record = True, dict[int | str, list[Figures]]()
    for count in options.jobs or [1000, 5000]:
        print(f"{count} jobs, {options.runs} run(s), {os.cpu_count()} cores, {platform.machine()}", flush=True)
        results = [run(count) for _ in range(options.runs)]
        print(f"  server: {results[0][1]}; load average {os.getloadavg()[0]:.1f}")
        runs = [figures for figures, _ in results]
        well &= compare(runs, spec["ranges"].get(count, {}))
        record[count] = runs
    print(f"{LIVES} whole lives", flush=True)
    if lives := run_lives():
        well &= compare([lives], spec["ranges"]["life"])
        record["life"] = [lives]
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
