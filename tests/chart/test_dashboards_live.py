"""Every panel shows data: a real Prometheus scrapes a real operator and real trainers, and answers every query.

The trainers' GPUs are simulated (see support/dashboards.py): tests/gpu/test_gpu_metrics.py reads a real one.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.constants import API_VERSION
from support.docs.dashboards import (
    Scene,
    filled,
    give_data,
    job,
    load,
    panels,
    scene,
)
from support.docs.prometheus import needs_prometheus
from support.server.client import Object
from support.server.server import Cluster

pytestmark = needs_prometheus
#: Of the jobs that train on: their adapters are still to be published.
NOT_YET = {"Upload time"}
#: There is nothing of the kind, and the panels say 0; these jobs measure the loss alone.
NONE = {"Idle GPUs", "Alerts that fire", "Alerts", "Finished jobs"}


@pytest.fixture(scope="module")
def running(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Two jobs that train, one that is done, one that waits for GPUs, and one whose data set is wrong."""
    folder: Path = tmp_path_factory.mktemp("dashboards")
    with cluster.namespace("dashboards") as namespace, scene(cluster, namespace, folder, gpus=4) as live:
        give_data(live.node, live.kube)
        live.unseen.add("broken")
        (live.node.claim_folder("data") / "broken.jsonl").write_text('{"text": 3}\n')
        waiting, broken = job("waiting", batchSize=8), job("broken")
        waiting["spec"]["resources"] = {"gpusPerNode": 8}
        broken["spec"]["dataset"] = {"train": "pvc://data/broken.jsonl"}
        # A sweep, suspended so that it starts nothing, to which two of the jobs belong.
        owner = live.kube.create(sweep("rates"))["metadata"]
        refs = [{"apiVersion": API_VERSION, "kind": "FineTuneSweep", "name": "rates", "uid": owner["uid"]}]
        alpha, gamma = job("alpha"), job("gamma", maxSteps=120)
        for trial in (alpha, gamma):
            trial["metadata"]["ownerReferences"] = [refs[0] | {"controller": True}]
        # gamma is to end, but not before a scrape has seen it train.
        for manifest in (alpha, job("beta", learningRate=0.001), gamma, waiting, broken):
            live.kube.create(manifest)

        def story_is_told() -> bool:
            query = live.prometheus.query
            trained = query("finetune_trainer_checkpoint_duration_seconds_count > 0 and finetune_trainer_eval_loss")
            failed = query('finetune_operator_attempts_ended_total{reason="DatasetInvalid"} > 0')
            published = query('finetune_operator_attempts_ended_total{reason="Succeeded"} > 0')
            waits = query("finetune_operator_gpu_jobs_longest_wait_seconds > 0")
            return len(trained) == 2 and bool(failed and published and waits)

        live.until(story_is_told, "two jobs have trained, evaluated and saved; one has failed, one is done")
        live.simulate_api_trouble()
        live.until(lambda: status(live, "alpha")["phase"] == "Training", "the operator has recovered")
        time.sleep(5)  # rates need a few scrapes after the last change
        yield live


def sweep(name: str) -> Object:
    """A suspended FineTuneSweep."""
    spec = {
        "template": job("x")["spec"],
        "suspend": True,
        "parameters": [{"path": "training.learningRate", "values": [0.01]}],
    }
    return {"apiVersion": API_VERSION, "kind": "FineTuneSweep", "metadata": {"name": name}, "spec": spec}


def status(live: Scene, name: str) -> Object:
    return live.kube.get("FineTuneJob", name)["status"]


def answer(live: Scene, expr: str, **variables: str) -> list[float]:
    found = live.prometheus.query(filled(expr, variables))
    return [float(sample["value"][1]) for sample in found]


def shown(live: Scene, panel: Object, target: Object, **variables: str) -> list[float]:
    """All the finite values a panel's query gives: a table asks for now, everything else for the time range."""
    if panel["type"] == "table":
        found = answer(live, target["expr"], **variables)
    else:
        series = live.prometheus.range(filled(target["expr"], variables), live.began, time.time(), 1)
        found = [float(value) for one in series for _, value in one["values"]]
    return [value for value in found if math.isfinite(value)]


def without_data(live: Scene, name: str, **variables: str) -> set[str]:
    """The panels of a dashboard with a query that shows nothing, or nothing but zeros."""
    return {
        panel["title"]
        for panel in panels(load(name))
        for target in panel["targets"]
        if not any(value > 0 for value in shown(live, panel, target, **variables))
    }


def now(live: Scene, dashboard: str, **variables: str) -> dict[str, list[float]]:
    """What each panel's first query says at one moment. A scrape of a busy trainer may time out: then another one."""
    found: dict[str, list[float]] = {}

    def is_answered() -> bool:
        for panel in panels(load(dashboard)):
            found[panel["title"]] = answer(live, panel["targets"][0]["expr"], **variables)
        return all(values for title, values in found.items() if title not in NOT_YET)

    live.until(is_answered, f"every panel of {dashboard} has a value", seconds=60)
    return found


def test_every_query_of_the_fleet_has_data(running: Scene) -> None:
    assert without_data(running, "fleet", namespace=".*") == NONE
    assert without_data(running, "fleet", namespace=running.namespace) == NONE


@pytest.mark.parametrize(("name", "missing"), [("alpha", NOT_YET), ("beta", NOT_YET), ("gamma", set())])
def test_every_query_of_a_job_has_data(running: Scene, name: str, missing: set[str]) -> None:
    assert without_data(running, "job", namespace=running.namespace, job=name) == missing


def test_every_query_of_a_sweep_has_data_and_tells_the_truth(running: Scene) -> None:
    where = {"namespace": running.namespace, "sweep": "rates"}
    assert without_data(running, "sweep", **where) == set()
    shows = now(running, "sweep", **where)
    assert shows["Trials started"] == [2]
    assert shows["Running"] == shows["Succeeded"] == shows["GPUs in use"] == [1]
    losses = [status(running, name)["progress"]["evalLoss"] for name in ("alpha", "gamma")]
    (lowest,) = shows["Lowest held-out loss"]
    assert lowest <= min(losses) + 0.05


def test_jobs_are_compared_by_step_and_by_label(running: Scene) -> None:
    where = {"namespace": running.namespace, "job": "alpha|beta|gamma", "label": "nlp"}
    assert without_data(running, "compare", **where) == {"Finished jobs"}
    (chart,) = (panel for panel in panels(load("compare")) if panel["title"] == "Loss by step")
    for target in chart["targets"]:
        found = running.prometheus.query(filled(target["expr"], where))
        assert {one["metric"]["name"] for one in found} == {"alpha", "beta", "gamma"}
        assert {one["metric"]["cost_label"] for one in found} == {"nlp"}
    other = where | {"label": "vision"}
    assert without_data(running, "compare", **other) == {panel["title"] for panel in panels(load("compare"))}


def test_finished_jobs_show_their_final_metrics(running: Scene) -> None:
    (table,) = (panel for panel in panels(load("fleet")) if panel["title"] == "Finished jobs")
    shows = {
        target["legendFormat"]: running.prometheus.query(filled(target["expr"], {"namespace": ".*"}))
        for target in table["targets"]
    }
    final = status(running, "gamma")["metrics"]
    for title, metric in (("Held-out before", "evalLossBefore"), ("Held-out", "evalLoss")):
        (found,) = shows[title]
        assert found["metric"] == {"namespace": running.namespace, "name": "gamma"}
        assert float(found["value"][1]) == pytest.approx(final[metric])


@pytest.mark.parametrize("name", ["fleet", "job", "sweep", "compare"])
def test_a_namespace_without_jobs_shows_none(running: Scene, name: str) -> None:
    """The variables do select: what a dashboard still shows elsewhere is the operator's own, and zeros."""
    of_the_operator = {panel["title"] for panel in _row(load("fleet"), "Operator")} if name == "fleet" else set()
    everything = {panel["title"] for panel in panels(load(name))}
    nowhere = {"namespace": "nowhere", "job": "alpha", "sweep": "rates", "label": ".*"}
    assert without_data(running, name, **nowhere) == everything - of_the_operator


def _row(dashboard: Object, title: str) -> list[Object]:
    """The panels below that row's title, up to the next row."""
    listed = dashboard["panels"]
    start = next(i for i, panel in enumerate(listed) if (panel["type"], panel["title"]) == ("row", title)) + 1
    end = next((i for i in range(start, len(listed)) if listed[i]["type"] == "row"), len(listed))
    return listed[start:end]


def test_variables_offer_the_namespaces_and_jobs_there_are(running: Scene) -> None:
    offered: dict[str, dict[str, set[str]]] = {}
    for name in ("fleet", "job", "sweep", "compare"):
        for variable in load(name)["templating"]["list"]:
            if variable["type"] == "query":
                query = filled(variable["query"]["query"], {"namespace": running.namespace, "label": ".*"})
                series, label = query.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
                values = running.prometheus.get(f"label/{label}/values", **{"match[]": series})
                offered.setdefault(name, {})[variable["name"]] = set(values)
    assert offered["fleet"] == {"namespace": {running.namespace}}
    assert offered["sweep"] == {"namespace": {running.namespace}, "sweep": {"rates"}}
    compared = {"namespace": {running.namespace}, "label": {"nlp"}}
    assert offered["compare"] == compared | {"job": {"alpha", "beta", "gamma", "waiting", "broken"}}
    assert offered["job"] == {"namespace": {running.namespace}, "job": {"alpha", "beta", "gamma"}}


def test_the_fleet_tells_the_truth(running: Scene) -> None:
    """Not only an answer, but the right one: what Prometheus says is what the API server and the trainers say."""
    fleet = now(running, "fleet", namespace=".*")
    assert fleet["Running"] == [2]
    assert fleet["Waiting"] == [1]
    assert fleet["GPUs in use"] == fleet["GPUs in use by namespace"] == [2]
    (hours,) = fleet["GPU hours"]
    assert 0 < hours <= 4 * (time.time() - running.began + 30) / 3600  # four jobs have held one each, at most
    assert fleet["Failed attempts"] == [1]
    (fast,) = fleet["Tokens per second"]
    assert fast > 0
    (waited,) = fleet["Longest wait of a GPU job"]
    assert 0 < waited <= time.time() - running.began


def test_a_job_tells_the_truth(running: Scene) -> None:
    alpha, beta = (now(running, "job", namespace=running.namespace, job=name) for name in ("alpha", "beta"))
    assert alpha["Attempts"] == beta["Attempts"] == [1]
    assert alpha["Learning rate"] != beta["Learning rate"]
    assert alpha["GPU out of memory"] == [1]
    assert alpha["Micro-batch"] == [status(running, "alpha")["executionPlan"]["microBatchSize"]] == [2]
    (used,), (busy,) = alpha["GPU memory"], alpha["GPU utilization"]
    assert 2**30 < used < 24 * 2**30
    assert 0 < busy <= 1
    steps = running.prometheus.query('finetune_trainer_steps{finetunejob="alpha"}')
    assert float(steps[0]["value"][1]) == status(running, "alpha")["progress"]["totalSteps"] == 5000


def test_the_alert_rules_run_in_the_same_prometheus_and_none_is_broken(running: Scene) -> None:
    groups = running.prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) >= 9
    assert {rule["health"] for rule in rules} == {"ok"}, json.dumps(rules)
    assert "FineTuneOperatorDown" not in {rule["name"] for rule in rules if rule["state"] == "firing"}
