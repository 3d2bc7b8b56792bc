"""The operator as a process: what it asks of the API server, what it says of itself, how it starts and stops."""

import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

from finetune_api.constants import LABEL_GPU_PRODUCT
from support.common.processes import Process, free_port
from support.node.node import ProcessNode
from support.operator.fixtures import Jobs, StartOperator
from support.operator.process import OperatorProcess
from support.server.client import Access, Kube, wait_until

WRITES = ("create", "patch", "update", "delete")


def test_the_life_of_a_job_costs_eight_writes_at_most(start_operator: StartOperator, node: ProcessNode, jobs: Jobs):
    """At the pace of production: a report of the trainer is read every 15 s. Longer runs add one write each time.

    What it used of the GPUs and what that cost is written along with the rest.
    """
    prices = {"gpu_prices": {"NVIDIA-L4": 3600}, "cost_label": "team"}
    operator = start_operator(progress_interval_seconds=15, **prices)
    on_l4 = {"gpusPerNode": 2, "nodeSelector": {LABEL_GPU_PRODUCT: "NVIDIA-L4"}}
    jobs.create("nli", labels={"team": "nlp"}, resources=on_l4)
    jobs.wait_over("nli")
    status = jobs.status("nli")
    used = 2 * status["attempts"][0]["runSeconds"]
    assert status["attempts"][0]["gpu"] == "NVIDIA-L4"
    assert status["usage"]["gpuHours"] == status["usage"].get("pricedGpuHours") == round(used / 3600, 4)
    assert (status["usage"]["cost"], status["usage"]["currency"]) == (used, "USD")
    team = {"namespace": jobs.kube.namespace, "cost_label": "nlp"}
    assert operator.metric("finetune_operator_gpu_cost_total", currency="USD", **team) == used
    assert abs((operator.metric("finetune_operator_gpu_seconds_total", **team) or 0) - used) < 0.2
    wait_until(lambda: operator.metric("finetune_operator_events_waiting") == 0, "all events are posted")
    writes = {verb: operator.metric("finetune_operator_api_requests_total", verb=verb) or 0 for verb in WRITES}
    assert sum(writes.values()) <= 8, "Job, four statuses, three events"
    assert operator.metric("finetune_operator_api_requests_total", verb="create", resource="jobs") == 1
    assert (operator.metric("finetune_operator_api_requests_total", code="409") or 0) == 0


def _requests_at_rest(operator: OperatorProcess) -> float:
    """Wait until the operator has done all that followed from the end of its jobs; return its requests so far."""
    seen = [-1.0]

    def has_settled() -> bool:
        seen.append(operator.metric("finetune_operator_api_requests_total") or 0.0)
        waiting = operator.metric("finetune_operator_events_waiting") or operator.metric(
            "finetune_operator_queue_depth"
        )
        return not waiting and seen[-1] == seen[-2]

    wait_until(has_settled, "all that follows is done", every=0.5)
    return seen[-1]


def test_at_rest_it_asks_the_api_server_nothing(own_operator: OperatorProcess, node: ProcessNode, jobs: Jobs):
    jobs.create("nli")
    jobs.wait_over("nli")
    before = _requests_at_rest(own_operator)
    for _ in range(5):
        jobs.kube.patch("FineTuneJob", "nli", {"metadata": {"annotations": {"look": "again"}}})
    reconciles = own_operator.metric("finetune_operator_reconcile_duration_seconds_count") or 0
    jobs.kube.patch("FineTuneJob", "nli", {"metadata": {"annotations": {"look": "once more"}}})
    wait_until(
        lambda: (own_operator.metric("finetune_operator_reconcile_duration_seconds_count") or 0) > reconciles,
        "a reconcile",
    )
    assert own_operator.metric("finetune_operator_api_requests_total") == before


def test_killing_the_process_loses_and_doubles_nothing(start_operator: StartOperator, node: ProcessNode, jobs: Jobs):
    first = start_operator()
    for number in range(4):
        jobs.create(f"nli-{number}", "fail-69/succeed")
    wait_until(lambda: jobs.children("nli-0"), "the first Job")
    first.process.kill()
    start_operator()
    for number in range(4):
        assert jobs.wait_over(f"nli-{number}", 120)["status"] == "True"
        assert jobs.reasons(f"nli-{number}") == ["Unavailable", "Succeeded"]
        assert len(jobs.children(f"nli-{number}")) == 2


def test_deleting_needs_no_operator(own_operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs):
    jobs.create("nli", "run")
    jobs.wait("nli", "Training", "True")
    own_operator.process.stop()
    job = kube.get("FineTuneJob", "nli")
    assert "finalizers" not in job["metadata"]
    assert not [key for key in job["metadata"].get("annotations", {}) if "kopf" in key]
    kube.delete("FineTuneJob", "nli")
    for kind in ("Job", "Pod"):
        wait_until(
            lambda kind=kind: not kube.list(kind, labelSelector="finetune.dev/job=nli"), f"no {kind} is left", 60
        )


def test_it_is_well_and_tells_prometheus_how_it_does(own_operator: OperatorProcess, node: ProcessNode, jobs: Jobs):
    jobs.create("nli")
    jobs.wait_over("nli")
    assert own_operator.get("/healthz").text == "ok"
    assert own_operator.metric("finetune_operator_jobs", phase="Succeeded") == 1
    assert own_operator.metric("finetune_operator_build_info", version="0.1.0") == 1
    assert own_operator.metric("finetune_operator_queue_depth") == 0
    assert own_operator.metric("finetune_operator_api_requests_total", verb="create", resource="jobs", code="201") == 1
    assert (own_operator.metric("finetune_operator_watch_age_seconds", resource="finetunejobs") or 0) < 75
    assert own_operator.metric("finetune_operator_attempts_ended_total", reason="Succeeded") == 1


def test_the_logs_are_json_and_hold_no_bodies(own_operator: OperatorProcess, node: ProcessNode, jobs: Jobs):
    jobs.create("nli")
    jobs.wait_over("nli")
    for line in own_operator.logs().splitlines():
        entry = yaml.safe_load(line)
        assert {"event", "level", "timestamp"} <= set(entry)
    assert "s3://simulated" not in own_operator.logs()


class ApiWithoutCrds(ThreadingHTTPServer):
    """An API server that knows no FineTuneJob (simulated: the tests' own servers all have the CRD)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


def test_without_the_crd_it_waits_and_says_so(tmp_path: Path):
    with ApiWithoutCrds() as server:
        kubeconfig = Access(server.url).write_kubeconfig(tmp_path / "kubeconfig")
        operator = OperatorProcess(kubeconfig, tmp_path, {"start_timeout_seconds": 1})
        wait_until(lambda: operator.process.returncode is not None, "it gives up")
    assert operator.process.returncode == 1
    names = "finetunejobs.finetune.dev, finetunesweeps.finetune.dev"
    assert f"not installed: CustomResourceDefinition {names}; apply crds/" in operator.logs()


def test_without_an_api_server_it_says_so_and_gives_up(tmp_path: Path):
    kubeconfig = Access("http://127.0.0.1:9").write_kubeconfig(tmp_path / "kubeconfig")
    operator = OperatorProcess(kubeconfig, tmp_path, {"start_timeout_seconds": 1})
    wait_until(lambda: operator.process.returncode is not None, "it gives up")
    assert operator.process.returncode == 1
    assert "the API server at http://127.0.0.1:9 does not answer" in operator.logs()
    assert "Traceback" not in operator.logs()


STUBBORN = """
import asyncio
from finetune_operator import main

async def work(self):
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass

main.Operator.work = work
main.SHUTDOWN_SECONDS = 1
main.main()
"""


def test_it_ends_even_when_a_task_cannot_be_cancelled(tmp_path: Path):
    port = free_port()
    env = os.environ | {
        "KUBECONFIG": str(Access("http://127.0.0.1:9").write_kubeconfig(tmp_path / "kubeconfig")),
        "FINETUNE_OPERATOR_HTTP_HOST": "127.0.0.1",
        "FINETUNE_OPERATOR_HTTP_PORT": str(port),
    }
    process = Process([sys.executable, "-c", STUBBORN], tmp_path / "operator.log", env)
    process.wait_for_url(f"http://127.0.0.1:{port}/healthz")
    began = time.monotonic()
    process.signal(signal.SIGTERM)
    wait_until(lambda: process.returncode is not None, "it ends")
    assert process.returncode == 1
    assert time.monotonic() - began < 10
    assert "shutdown timed out; exiting with pending tasks" in process.output()
