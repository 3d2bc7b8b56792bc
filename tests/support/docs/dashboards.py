"""Grafana's dashboards as data, and a live scene for them: a real operator, real trainers and a real Prometheus.

The trainers run on the CPU. What they tell of a GPU is simulated: see SIMULATED_GPU and SIMULATED_NVML.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from finetune_api import constants
from support.docs import prometheus as servers
from support.docs.chart import (
    CHART,
    find,
    objects,
    values_of,
)
from support.docs.prometheus import Prometheus
from support.node.node import ProcessNode
from support.operator import process
from support.operator.process import OperatorProcess
from support.server.client import Kube, Object
from support.server.fault_proxy import ApiProxy
from support.server.loop_thread import LoopThread
from support.server.server import Cluster
from support.trainer.tiny_model import build_model, nli_rows, write_jsonl

#: The real trainer with a GPU in name only: it trains on the CPU, its plan is that of Mistral-7B on one of 24 GiB, and
#: more than two sequences in one pass are more than that GPU holds.
SIMULATED_GPU = f"""#!{sys.executable}
import sys

import torch

from finetune_trainer.cli import cli
from finetune_trainer.planning.model_shape import ModelShape
from finetune_trainer.runtime import device
from finetune_trainer.training.loop import QloraTrainer

train = QloraTrainer.training_step

def training_step(self, model, inputs, *rest, **options):
    if len(inputs["input_ids"]) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
    return train(self, model, inputs, *rest, **options)

shape = ModelShape(32768, 4096, 14336, layers=32, heads=32, kv_heads=8, head_dim=128)
QloraTrainer.training_step = training_step
ModelShape.from_config = lambda *_: shape
device.inspect_device = lambda spec, ranks: device.RuntimeDevice("cuda", "simulated", 24 << 30)
sys.argv += ["--set", "resources.gpusPerNode=0"]
sys.exit(cli())
"""
#: Stands in for NVIDIA's library: one GPU that works when the trainer's process does and holds nine times its memory.
SIMULATED_NVML = """
from types import SimpleNamespace

import psutil

process = psutil.Process()

class NVMLError(Exception):
    pass

class NVMLError_NotSupported(NVMLError):
    pass

def nvmlInit():
    process.cpu_percent()

def nvmlDeviceGetCount():
    return 1

def nvmlDeviceGetHandleByIndex(index):
    return index

def nvmlDeviceGetMemoryInfo(handle):
    return SimpleNamespace(used=9 * process.memory_info().rss)

def nvmlDeviceGetUtilizationRates(handle):
    return SimpleNamespace(gpu=min(100, process.cpu_percent()))
"""

FOLDER = CHART / "files" / "dashboards"
#: What Grafana fills in by itself, for scrapes each second.
GRAFANA = {"__rate_interval": "10s", "__range": "15m"}


def load(name: str) -> Object:
    """The dashboard `fleet` or `job`."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def panels(dashboard: Object) -> list[Object]:
    """Those that show something: rows left out."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def filled(expr: str, variables: Mapping[str, str]) -> str:
    """PromQL as Grafana sends it. Raises AssertionError where a variable is left over."""
    for name, value in sorted({**GRAFANA, **variables}.items(), key=lambda item: -len(item[0])):
        expr = expr.replace(f"${name}", value)
    assert "$" not in expr, expr
    return expr


class TroubledApi(ApiProxy):
    """Lets every write wait for `write_delay` seconds, besides what an ApiProxy does."""

    write_delay = 0.0

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "PATCH":
            await asyncio.sleep(self.write_delay)
        return await super()._handle(request)


@dataclass
class Scene:
    """Everything runs. `refresh` tells Prometheus of new pods, as Kubernetes' discovery would."""

    kube: Kube
    node: ProcessNode
    operator: OperatorProcess
    api: TroubledApi
    prometheus: Prometheus
    targets: Path
    operator_labels: dict[str, str]
    namespace: str
    began: float
    """Unix time."""
    unseen: set[str] = field(default_factory=set)
    """Jobs that Prometheus never hears of: a short one may end before the first scrape, or after it."""

    def refresh(self) -> None:
        def meta(namespace: str, pod: str, labels: Mapping[str, str], port: str) -> dict[str, str]:
            prefix = "__meta_kubernetes_"
            named = {f"{prefix}pod_label_{_safe(key)}": value for key, value in labels.items()}
            place = {f"{prefix}namespace": namespace, f"{prefix}pod_name": pod}
            return named | place | {f"{prefix}pod_container_port_name": port}

        address = self.operator.url.removeprefix("http://")
        found = [{"targets": [address], "labels": meta("system", "operator-0", self.operator_labels, "http")}]
        for pod in self.kube.list("Pod", self.namespace):
            if pod["metadata"]["name"].partition("-")[0] in self.unseen:
                continue
            if (pod.get("status") or {}).get("phase") == "Running" and pod["status"].get("podIP"):
                (port,) = pod["spec"]["containers"][0]["ports"]
                labels = meta(self.namespace, pod["metadata"]["name"], pod["metadata"]["labels"], port["name"])
                found.append({"targets": [f"{pod['status']['podIP']}:{port['containerPort']}"], "labels": labels})
        fresh = self.targets.with_suffix(".new")
        fresh.write_text(json.dumps(found))
        fresh.replace(self.targets)  # never half a file

    def until(self, holds: Callable[[], object], what: str, seconds: float = 420) -> None:
        """Keep refreshing until `holds`."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"not in time: {what}\n{self.node.all_logs()[-3000:]}"
            self.refresh()
            time.sleep(0.5)

    def simulate_api_trouble(self, seconds: float = 4) -> None:
        """The operator's API server is slow for a while, so that jobs wait for its worker; then away for as long."""
        self.api.write_delay = seconds / 2
        self._let_pass(seconds)
        self.api.write_delay, self.api.away = 0.0, True
        self._let_pass(seconds)
        self.api.away = False

    def _let_pass(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, "time passes")


def _safe(label: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in label)


def _environment(folder: Path) -> dict[str, str]:
    """Of every container. The simulated GPU is found before the real trainer and NVIDIA's library."""
    folder.mkdir()
    script = folder / constants.TRAINER_COMMAND
    script.write_text(SIMULATED_GPU)
    script.chmod(0o755)
    (folder / "pynvml.py").write_text(SIMULATED_NVML)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    modules = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PATH": path, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def _troubled_api(cluster: Cluster) -> Iterator[TroubledApi]:
    """What lies between the operator and the API server."""
    thread, api = LoopThread("api-proxy"), TroubledApi(cluster.access)
    thread.run(api.__aenter__())
    try:
        yield api
    finally:
        thread.run(api.__aexit__())
        thread.stop()


@contextmanager
def scene(cluster: Cluster, namespace: str, folder: Path, gpus: int) -> Iterator[Scene]:
    """An operator for `namespace`, a node with so many simulated GPUs, the trial's Prometheus, scraping each second."""
    kube = Kube(cluster.access, namespace)
    found = objects(values_of("demo"), namespace)
    config, rules = servers.trial_config(found)
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "5s"}
    (folder / "alerts.yml").write_text(rules)
    targets = servers.by_file(config, folder)
    labels = find(found, "Deployment", "tune-finetune-operator")["spec"]["template"]["metadata"]["labels"]
    # One worker: with more, jobs hardly ever wait for one.
    settings = {"namespaces": [namespace], "progress_interval_seconds": 1, "workers": 1}
    settings |= {"gpu_prices": {"simulated": 3600.0}, "cost_label": "team"}
    began = time.time()
    with (
        ProcessNode(cluster, namespace, folder, env=_environment(folder / "simulated-gpu"), gpus=gpus) as node,
        _troubled_api(cluster) as api,
        process.running(api.access.write_kubeconfig(folder / "kubeconfig"), folder / "operator", settings) as operator,
        servers.start(folder, config) as prometheus,
    ):
        yield Scene(kube, node, operator, api, prometheus, targets, labels, namespace, began)
    kube.close()


def give_data(node: ProcessNode, kube: Kube, claim: str = "data") -> None:
    """A claim with a tiny model and NLI rows."""
    folder = node.claim_folder(claim)
    build_model(folder / "model")
    write_jsonl(folder / "train.jsonl", nli_rows(200))
    write_jsonl(folder / "eval.jsonl", nli_rows(12, seed=5))
    request = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    kube.create({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim}, "spec": request})


def job(name: str, claim: str = "data", **training: Any) -> Object:
    """A FineTuneJob that trains the tiny model on one (simulated) GPU for as long as it is let."""
    at = f"pvc://{claim}"
    spec = {
        "model": {"source": f"{at}/model"},
        "dataset": {"train": f"{at}/train.jsonl", "eval": f"{at}/eval.jsonl"},
        "lora": {"rank": 4, "alpha": 8},
        "training": {"maxSteps": 5000, "batchSize": 4, "learningRate": 0.005, "maxLength": 128, **training},
        "evaluation": {"everySteps": 20},
        "checkpoint": {"everySteps": 20},
        "logging": {"everySteps": 2},
        "resources": {"gpusPerNode": 1},
        "output": {"uri": f"{at}/adapters/{name}"},
    }
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "labels": {"team": "nlp"}},
        "spec": spec,
    }
