"""How sweeps scale: one FineTuneSweep of a thousand trials on a real kube-apiserver (or the stand-in, said so).

    python benchmarks/sweep_scale.py --trials 1000 [--packed]

Server, operator and this program share the machine. The trials get no pods, for there is no Job controller. "planned"
is when the last trial has its FineTuneJob, which with --packed four share; "converged" when the last has its Job and
its status. Exit code 1 when a limit of rangespec.yaml is passed.
"""

import argparse
import asyncio
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from operator_scale import (
    RANGESPEC,
    REQUESTS,
    SETTINGS,
    Figures,
    Seen,
    compare,
    cpu_seconds,
    manifest,
    servers,
    until,
    writes,
)

from finetune_api import constants
from support.operator.process import OperatorProcess, running
from support.server import server as clusters
from support.server.client import AsyncKube, path_of

#: Of a step that takes a few seconds: whatever takes longer stands still, because a server was ended, for one.
PATIENCE_SECONDS = 120
#: Trials of 4 rows that fill a step of 16.
TRIALS_IN_PACK = 4


def sweep(trials: int, packed: bool) -> dict[str, Any]:
    rates = [round(1e-6 * number, 6) for number in range(1, trials + 1)]
    parameters = [{"path": "training.learningRate", "values": rates}]
    template = manifest("nli")["spec"]
    if packed:
        template["training"] = template.get("training", {}) | {"batchSize": 16 // TRIALS_IN_PACK}
    packing = "enabled" if packed else "disabled"
    spec = {"template": template, "parameters": parameters, "parallelism": trials, "packing": packing}
    return {
        "apiVersion": constants.API_VERSION,
        "kind": constants.SWEEP_KIND,
        "metadata": {"name": "nli"},
        "spec": spec,
    }


async def measure(
    cluster: clusters.Cluster, operator: OperatorProcess, namespace: str, trials: int, packed: bool
) -> Figures:
    """One sweep, from its creation until nothing is left to write."""
    kube, seen = AsyncKube(cluster.access), Seen(cluster.access, namespace)
    followers = [asyncio.create_task(seen.follow(kind)) for kind in (constants.KIND, "Job")]
    await asyncio.sleep(1)
    before, began = writes(operator), time.monotonic()
    every = {"operator": [psutil.Process(operator.process.pid)], "server": servers(cluster)}
    cpu_before = {name: cpu_seconds(found) for name, found in every.items()}
    await kube.request("POST", path_of(constants.SWEEP_KIND, namespace), sweep(trials, packed))
    planned, jobs = 0.0, math.ceil(trials / TRIALS_IN_PACK) if packed else trials
    while not planned:
        await asyncio.sleep(0.1)
        made = operator.metric(REQUESTS, verb="create", resource=constants.PLURAL) or 0
        planned = time.monotonic() - began if made >= jobs else 0.0
        if not planned and time.monotonic() - began > PATIENCE_SECONDS:
            last = "\n".join(operator.logs().splitlines()[-5:])
            raise SystemExit(f"{made:g} of {jobs} FineTuneJobs are created after {PATIENCE_SECONDS} s:\n{last}")
    await seen.wait_for(jobs, PATIENCE_SECONDS)
    figures = {"planned_seconds": planned, "converged_seconds": time.monotonic() - began}
    await until(operator, "finetune_operator_queue_depth")
    await until(operator, "finetune_operator_events_waiting")
    await asyncio.sleep(2)
    figures["writes_per_trial"] = (writes(operator) - before) / trials
    for name, found in every.items():
        figures[f"{name}_cpu_ms_per_trial"] = 1000 * (cpu_seconds(found) - cpu_before[name]) / trials
    patched = operator.metric(REQUESTS, verb="patch", resource=f"{constants.SWEEP_PLURAL}/status")
    figures["sweep_status_writes"] = patched or 0
    stored = await kube.request("GET", path_of(constants.SWEEP_KIND, namespace, "nli"))
    assert len(stored["status"]["trials"]) == trials, stored["status"]["counts"]
    for follower in followers:
        follower.cancel()
    await asyncio.gather(*followers, return_exceptions=True)
    await kube.close()
    return figures


def run(trials: int, packed: bool) -> Figures:
    """One run on a fresh server."""
    kind = "apiserver" if "apiserver" in clusters.available() else clusters.STANDIN
    folder = Path(tempfile.mkdtemp(prefix="finetune-bench-"))
    print(
        f"{trials} trials{', four in a FineTuneJob' if packed else ''}, {os.cpu_count()} cores, {platform.machine()}",
        flush=True,
    )
    with (
        clusters.start(kind) as cluster,
        cluster.namespace("bench") as namespace,
        running(cluster.kubeconfig, folder / "first", SETTINGS | {"namespaces": [namespace]}) as operator,
    ):
        figures = asyncio.run(measure(cluster, operator, namespace, trials, packed))
        print(f"  server: {clusters.describe(kind)}; load average {os.getloadavg()[0]:.1f}")
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="number of trials")
    parser.add_argument("--packed", action="store_true", help="trials of 4 rows, four in a FineTuneJob")
    parser.add_argument("--runs", type=int, default=1, help="runs for mean and spread")
    options = parser.parse_args()
    limits = yaml.safe_load(RANGESPEC.read_text())["ranges"].get("sweep-packed" if options.packed else "sweep", {})
    sys.exit(0 if compare([run(options.trials, options.packed) for _ in range(options.runs)], limits) else 1)


if __name__ == "__main__":
    main()
