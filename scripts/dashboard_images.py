"""Make docs/images/dashboard-{fleet,job,compare,sweep}.png: jobs run on this CPU, and their Prometheus is drawn.

    python scripts/dashboard_images.py [--minutes 4] [fleet] [job] [compare] [sweep]

Needs what the tests need: Prometheus, and the API server of `make envtest` or its stand-in.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTE = "Drawn from a CPU run of a tiny model. Values of GPUs are simulated."
STEPS = 800
SWEEP_STEPS = 120
DASHBOARDS = ("fleet", "job", "compare", "sweep")
sys.path.insert(0, str(ROOT / "tests"))

from draw_dashboard import Source, draw  # noqa: E402

from support.docs import prometheus  # noqa: E402
from support.docs.dashboards import Scene, give_data, job, load, scene  # noqa: E402
from support.server import server as clusters  # noqa: E402


def tell(live: Scene, minutes: float) -> float:
    """Write the story to draw; return when it began.

    A job is preempted, resumes and is published; one trains on, one fails, one waits for GPUs. For a moment the API
    server does not answer.
    """
    (live.node.claim_folder("data") / "broken.jsonl").write_text('{"text": 3}\n')
    waiting, broken = job("llama-70b", batchSize=16), job("bad-data")
    waiting["spec"]["resources"] = {"gpusPerNode": 8}
    broken["spec"]["dataset"] = {"train": "pvc://data/broken.jsonl"}
    began = time.time()
    main = job("mistral-nli", maxSteps=STEPS, learningRate=0.004)
    main["spec"]["lora"] = {"rank": 16, "alpha": 32, "targetModules": ["all-linear"]}
    live.kube.create(main)
    live.kube.create(waiting)
    _wait(live, began + 15)
    chat = job("support-chat", learningRate=0.002)
    chat["metadata"]["labels"] = {"team": "support"}
    live.kube.create(chat)
    live.until(lambda: _step(live, "mistral-nli") > STEPS / 2, "half of the job is done")
    (pod,) = (p["metadata"]["name"] for p in _pods(live, "mistral-nli"))
    live.node.drain(pod)
    live.kube.create(broken)
    live.until(lambda: _step(live, "mistral-nli") > STEPS * 0.75, "the job has resumed")
    live.simulate_api_trouble()
    live.until(lambda: _status(live, "mistral-nli").get("adapter"), "the job is published")
    _wait(live, max(time.time() + 10, began + 60 * minutes))
    return began


def tell_sweep(live: Scene) -> float:
    """Write the story of a sweep: five trials, two at a time, one of which does not learn; return when it began."""
    template = job("x", maxSteps=SWEEP_STEPS)["spec"] | {"output": {"uri": "pvc://data/rates"}}
    rates = {"path": "training.learningRate", "values": [0.0005, 0.002, 0.01, 0.03, 0.3]}
    spec = {"template": template, "parallelism": 2, "parameters": [rates]}
    began = time.time()
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneSweep", "metadata": {"name": "rates"}, "spec": spec}
    live.kube.create(body)

    def is_over() -> bool:
        status = live.kube.get("FineTuneSweep", "rates").get("status") or {}
        return bool(status.get("completionTime"))

    live.until(is_over, "the sweep has ended")
    _wait(live, time.time() + 5)
    return began


def _status(live: Scene, name: str) -> dict:
    return live.kube.get("FineTuneJob", name).get("status") or {}


def _step(live: Scene, name: str) -> int:
    return (_status(live, name).get("progress") or {}).get("step") or 0


def _pods(live: Scene, name: str) -> list[dict]:
    found = live.kube.list("Pod", live.namespace, labelSelector=f"finetune.dev/job={name}")
    return [pod for pod in found if pod["status"]["phase"] == "Running"]


@contextmanager
def _namespace(cluster: clusters.Cluster, name: str) -> Iterator[str]:
    cluster.kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name  # it goes with the cluster


def _wait(live: Scene, until: float) -> None:
    while time.time() < until:
        live.refresh()
        time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4, help="least length of the story")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "images", help="where the images go")
    parser.add_argument("dashboards", nargs="*", choices=[[], *DASHBOARDS], help="default: all")
    wanted = parser.parse_args()
    if prometheus.IS_MISSING:
        parser.error(prometheus.HOW_TO_GET_IT)
    names = wanted.dashboards or DASHBOARDS
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wanted.folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        clusters.start() as cluster,
        _namespace(cluster, "research") as namespace,
        scene(cluster, namespace, Path(folder), gpus=3) as live,
    ):
        give_data(live.node, live.kube)
        variables = {
            "fleet": {"namespace": ".*"},
            "job": {"namespace": namespace, "job": "mistral-nli"},
            "compare": {"namespace": ".*", "label": ".*", "job": "mistral-nli|support-chat"},
            "sweep": {"namespace": namespace, "sweep": "rates"},
        }
        stories: dict[str, tuple[float, float]] = {}
        if of_jobs := [name for name in names if name != "sweep"]:
            stories |= dict.fromkeys(of_jobs, (tell(live, wanted.minutes), time.time()))
            live.kube.delete("FineTuneJob", "support-chat")
        if "sweep" in names:
            stories["sweep"] = tell_sweep(live), time.time()
        for name in names:
            began, ended = stories[name]
            source = Source(live.prometheus.url, began, ended, variables[name], scrape_seconds=1)
            empty = draw(load(name), source, wanted.folder / f"dashboard-{name}.png", NOTE)
            sys.stdout.write(f"dashboard-{name}.png; without data: {', '.join(empty) or 'none'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
