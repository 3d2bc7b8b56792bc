"""Every panel shows data: a real Prometheus scrapes a real operator and two real trainers, and answers every query."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cluster import Cluster
from support.dashboards import Scene, filled, give_data, job, load, panels, scene
from support.prometheus import needs_prometheus

pytestmark = needs_prometheus
#: Queries that only a machine with an NVIDIA GPU can answer; tests/gpu/test_gpu_metrics.py asks them there.
GPU_ONLY = ("finetune_trainer_gpu_utilization_ratio", "finetune_trainer_gpu_memory")


@pytest.fixture(scope="module")
def running(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Two jobs that train, one that waits for a GPU, and one whose data set is wrong."""
    folder: Path = tmp_path_factory.mktemp("dashboards")
    with cluster.namespace("dashboards") as namespace, scene(cluster, namespace, folder) as live:
        give_data(live)
        (live.node.claim_folder("data") / "broken.jsonl").write_text('{"text": 3}\n')
        waiting, broken = job("waiting"), job("broken")
        waiting["spec"]["resources"] = {"gpusPerNode": 1}
        broken["spec"]["dataset"] = {"train": "pvc://data/broken.jsonl"}
        for manifest in (job("alpha"), job("beta", learningRate=0.001), waiting, broken):
            live.kube.create(manifest)

        def story_is_told() -> bool:
            query = live.prometheus.query
            trained = query("finetune_trainer_checkpoint_duration_seconds_count > 0 and finetune_trainer_eval_loss")
            failed = query('finetune_operator_attempts_ended_total{reason="DatasetInvalid"} > 0')
            first_steps = query("finetune_operator_time_to_first_step_seconds_count >= 2")
            waits = query("finetune_operator_gpu_jobs_longest_wait_seconds > 0")
            return len(trained) == 2 and bool(failed and first_steps and waits)

        live.until(story_is_told, "two jobs have trained, evaluated and saved; one has failed")
        time.sleep(5)  # rates need a few scrapes after the last change
        yield live


def answer(live: Scene, expr: str, **variables: str) -> list[float]:
    found = live.prometheus.query(filled(expr, variables))
    return [float(sample["value"][1]) for sample in found]


def unanswered(live: Scene, name: str, **variables: str) -> list[str]:
    """The queries of a dashboard that give nothing, or nothing finite."""
    found = []
    for panel in panels(load(name)):
        for target in panel["targets"]:
            values = answer(live, target["expr"], **variables)
            if not values or not all(map(math.isfinite, values)):
                found.append(f"{panel['title']}: {target['expr']}")
    return found


def test_every_query_of_the_fleet_has_an_answer(running: Scene) -> None:
    assert unanswered(running, "fleet", namespace=".*") == []
    assert unanswered(running, "fleet", namespace=running.namespace) == []


def test_every_query_of_either_job_has_an_answer(running: Scene) -> None:
    for name in ("alpha", "beta"):
        found = unanswered(running, "job", namespace=running.namespace, job=name)
        assert [query for query in found if not any(metric in query for metric in GPU_ONLY)] == []


def test_variables_offer_the_namespaces_and_jobs_there_are(running: Scene) -> None:
    offered: dict[str, dict[str, set[str]]] = {}
    for name in ("fleet", "job"):
        for variable in load(name)["templating"]["list"]:
            if variable["type"] == "query":
                query = filled(variable["query"]["query"], {"namespace": running.namespace})
                series, label = query.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
                values = running.prometheus.get(f"label/{label}/values", **{"match[]": series})
                offered.setdefault(name, {})[variable["name"]] = set(values)
    assert offered["fleet"] == {"namespace": {running.namespace}}
    assert offered["job"] == {"namespace": {running.namespace}, "job": {"alpha", "beta"}}


def test_panels_tell_the_truth(running: Scene) -> None:
    """Not only an answer, but the right one: what Prometheus says is what the API server and the trainers say."""
    exprs = {p["title"]: p["targets"][0]["expr"] for p in panels(load("fleet"))}
    assert answer(running, exprs["Running"], namespace=".*") == [2]
    assert answer(running, exprs["Waiting"], namespace=".*") == [1]
    assert answer(running, exprs["GPUs in use"], namespace=".*") == [0]
    (failed,) = answer(running, exprs["Failed attempts"], namespace=".*")
    assert round(failed) == 1
    one = {p["title"]: p["targets"][0]["expr"] for p in panels(load("job"))}
    (attempts,) = answer(running, one["Attempts"], namespace=running.namespace, job="alpha")
    (rate_alpha,) = answer(running, one["Learning rate"], namespace=running.namespace, job="alpha")
    (rate_beta,) = answer(running, one["Learning rate"], namespace=running.namespace, job="beta")
    assert attempts == 1
    assert rate_alpha != rate_beta
    status = running.kube.get("FineTuneJob", "alpha")["status"]["progress"]
    steps = running.prometheus.query('finetune_trainer_steps{finetunejob="alpha"}')
    assert float(steps[0]["value"][1]) == status["totalSteps"] == 5000


def test_the_alert_rules_run_in_the_same_prometheus_and_none_is_broken(running: Scene) -> None:
    groups = running.prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) >= 9
    assert {rule["health"] for rule in rules} == {"ok"}, json.dumps(rules)
    assert "FineTuneOperatorDown" not in {rule["name"] for rule in rules if rule["state"] == "firing"}
