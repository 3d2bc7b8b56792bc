"""Grafana's dashboards as data, and a live scene for them: a real operator, real trainers and a real Prometheus."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import operator_process
from support import prometheus as servers
from support.chart import CHART, find, objects, values_of
from support.cluster import Cluster
from support.kube import Kube, Object
from support.models import build_model, nli_rows, write_jsonl
from support.operator_process import OperatorProcess
from support.process_node import ProcessNode
from support.prometheus import Prometheus

FOLDER = CHART / "files" / "dashboards"
#: What Grafana fills in by itself, for scrapes each second.
GRAFANA = {"__rate_interval": "10s", "__range": "5m"}


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


@dataclass
class Scene:
    """Everything runs. `refresh` tells Prometheus of new pods, as Kubernetes' discovery would."""

    kube: Kube
    node: ProcessNode
    operator: OperatorProcess
    prometheus: Prometheus
    targets: Path
    operator_labels: dict[str, str]
    namespace: str

    def refresh(self) -> None:
        def meta(namespace: str, pod: str, labels: Mapping[str, str], port: str) -> dict[str, str]:
            prefix = "__meta_kubernetes_"
            named = {f"{prefix}pod_label_{_safe(key)}": value for key, value in labels.items()}
            place = {f"{prefix}namespace": namespace, f"{prefix}pod_name": pod}
            return named | place | {f"{prefix}pod_container_port_name": port}

        address = self.operator.url.removeprefix("http://")
        found = [{"targets": [address], "labels": meta("system", "operator-0", self.operator_labels, "http")}]
        for pod in self.kube.list("Pod", self.namespace):
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


def _safe(label: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in label)


@contextmanager
def scene(cluster: Cluster, namespace: str, folder: Path) -> Iterator[Scene]:
    """An operator for `namespace`, a node without GPUs, and the trial's Prometheus, scraping each second."""
    kube = Kube(cluster.access, namespace)
    found = objects(values_of("demo"), namespace)
    config, rules = servers.trial_config(found)
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "5s"}
    (folder / "alerts.yml").write_text(rules)
    targets = servers.by_file(config, folder)
    labels = find(found, "Deployment", "tune-finetune-operator")["spec"]["template"]["metadata"]["labels"]
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings = {"namespaces": [namespace], "progress_interval_seconds": 1}
    with (
        ProcessNode(cluster, namespace, folder, env=environment, gpus=0) as node,
        operator_process.running(cluster.kubeconfig, folder / "operator", settings) as operator,
        servers.start(folder, config) as prometheus,
    ):
        yield Scene(kube, node, operator, prometheus, targets, labels, namespace)
    kube.close()


def give_data(scene: Scene, claim: str = "data") -> None:
    """A claim with a tiny model and NLI rows."""
    folder = scene.node.claim_folder(claim)
    build_model(folder / "model")
    write_jsonl(folder / "train.jsonl", nli_rows(200))
    write_jsonl(folder / "eval.jsonl", nli_rows(12, seed=5))
    request = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    scene.kube.create(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim}, "spec": request}
    )


def job(name: str, claim: str = "data", **training: Any) -> Object:
    """A FineTuneJob that trains the tiny model on the CPU for as long as it is let."""
    at = f"pvc://{claim}"
    spec = {
        "model": {"source": f"{at}/model"},
        "dataset": {"train": f"{at}/train.jsonl", "eval": f"{at}/eval.jsonl"},
        "lora": {"rank": 4, "alpha": 8},
        "training": {"maxSteps": 5000, "batchSize": 4, "learningRate": 0.005, "maxLength": 128, **training},
        "evaluation": {"everySteps": 20},
        "checkpoint": {"everySteps": 20},
        "logging": {"everySteps": 2},
        "resources": {"gpusPerNode": 0},
        "output": {"uri": f"{at}/adapters/{name}"},
    }
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": spec,
    }
