"""GPU time and cost by namespace and label: bounded whatever labels people choose, and equal to the statuses."""

from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry

from finetune_api.sweep import FineTuneSweep, FineTuneSweepSpec
from finetune_api.sweep_packs import Holder
from finetune_api.sweep_trials import expand
from finetune_operator.core import controllers
from finetune_operator.core.objects.observed import KEPT_BYTES, JobObject
from finetune_operator.core.sweep.trials import Sweep, job_of
from finetune_operator.observability.job_metrics import KEPT_WITHOUT_JOBS, JobMetrics
from finetune_operator.observability.usage_metrics import MAX_LABEL_VALUES, OTHER
from support.simulation.sweep_world import TEMPLATE

NOW = datetime(2026, 11, 1, tzinfo=UTC)
REGISTRY = controllers.registry("example.com/team")


def job(
    name: str = "nli",
    team: str | None = "nlp",
    usage: dict[str, Any] | None = None,
    namespace: str = "research",
    phase: str = "Training",
    **more: Any,
) -> JobObject:
    labels = {} if team is None else {"example.com/team": team, "other": "x"}
    metadata = {"name": name, "namespace": namespace, "uid": name, "labels": labels, "resourceVersion": "1"}
    status = {"phase": phase, **({"usage": usage} if usage else {}), **more}
    found = REGISTRY["FineTuneJob"].view({"metadata": metadata, "spec": {}, "status": status})
    assert isinstance(found, JobObject)
    return found


def fleet(*jobs: JobObject, currency: str | None = "EUR", limit: int = 10) -> tuple[JobMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    return JobMetrics(lambda: jobs, limit, lambda: NOW, registry, currency), registry


def values(registry: CollectorRegistry, name: str) -> dict[str, float]:
    samples = [s for metric in registry.collect() for s in metric.samples if s.name == f"finetune_operator_{name}"]
    return {"/".join(s.labels.values()): s.value for s in samples}


def test_counters_begin_at_zero_and_grow_by_what_attempts_used() -> None:
    one, registry = fleet(job(), job("other", team=None))
    assert values(registry, "gpu_seconds_total") == {"research/nlp": 0, "research/": 0}
    assert values(registry, "gpu_cost_total") == {"research/nlp/EUR": 0, "research//EUR": 0}
    first = job(usage={"gpuHours": 1, "cost": 3.6, "currency": "EUR", "pricedGpuHours": 1})
    second = job(usage={"gpuHours": 3, "cost": 4.6, "currency": "EUR", "pricedGpuHours": 2})
    for before, after in ((job(), first), (first, first), (first, second)):
        one.record_status(before, after)
    one.record_status(job("other", team=None), job("other", team=None, usage={"gpuHours": 0.5}))
    assert values(registry, "gpu_seconds_total") == {"research/nlp": 3 * 3600, "research/": 1800}
    assert values(registry, "gpu_cost_total") == {"research/nlp/EUR": 4.6, "research//EUR": 0}


def test_without_prices_there_is_no_cost() -> None:
    one, registry = fleet(job(), currency=None)
    one.record_status(job(), job(usage={"gpuHours": 1}))
    assert values(registry, "gpu_cost_total") == values(registry, "job_gpu_cost") == {}


def test_whoever_chooses_many_values_gets_counters_for_some_and_costs_no_other_namespace() -> None:
    many = [job(f"nli-{number}", team=f"t{number}") for number in range(MAX_LABEL_VALUES + 20)]
    one, registry = fleet(*many, job(namespace="products", team="sales"))
    assert len(values(registry, "gpu_seconds_total")) == MAX_LABEL_VALUES + 2
    for each in many:
        after = job(each.name, team=each.cost_label, usage={"gpuHours": 1})
        one.record_status(each, after)
    found = values(registry, "gpu_seconds_total")
    assert found[f"research/{OTHER}"] == 20 * 3600
    assert sum(found.values()) == len(many) * 3600
    assert found["products/sales"] == 0


def test_counters_go_with_their_namespace() -> None:
    jobs, now = [job(), job(namespace="products")], [NOW]
    registry = CollectorRegistry()
    JobMetrics(lambda: jobs, 10, lambda: now[0], registry, "EUR")
    values(registry, "gpu_cost_total")
    jobs.pop(0)
    now[0] += KEPT_WITHOUT_JOBS * 2
    values(registry, "gpu_cost_total")
    assert values(registry, "gpu_cost_total") == {"products/nlp/EUR": 0}


def test_jobs_have_gauges_up_to_the_limit_however_large_their_status_is() -> None:
    usage = {"gpuHours": 2, "cost": 5.0, "currency": "EUR", "pricedGpuHours": 2}
    large = job("large", usage=usage, phase="Succeeded", attempts=[{"message": "m" * KEPT_BYTES}]).kept()
    assert not large.is_whole
    forged = [job("bad", usage={"gpuHours": "many"}), job("worse", usage={"gpuHours": -1, "cost": 1e300})]
    _, registry = fleet(large, job("new"), job("live", usage={"gpuHours": 1}), *forged)
    assert values(registry, "job_gpu_seconds") == {"research/large": 7200, "research/live": 3600}
    assert values(registry, "job_gpu_cost") == {"research/large/EUR": 5}
    over = [job(f"j{number}", usage=usage, phase="Failed") for number in range(20)]
    _, registry = fleet(*over, limit=3)
    assert len(values(registry, "job_gpu_seconds")) == 3


def test_trials_carry_the_label_of_their_sweep() -> None:
    metadata = {"name": "rates", "namespace": "research", "uid": "7", "labels": {"example.com/team": "nlp", "x": "y"}}
    sweep = REGISTRY["FineTuneSweep"].view({"metadata": metadata, "spec": {}})
    spec = FineTuneSweepSpec.model_validate({"template": TEMPLATE, "trials": [{"name": "a"}, {"name": "b"}]})
    found = FineTuneSweep.model_construct(spec=spec)
    for trials in (("a",), ("a", "b")):
        job = job_of(sweep, Sweep(found, TEMPLATE, expand("rates", spec)), Holder(trials[0], trials))
        assert job["metadata"]["labels"]["example.com/team"] == "nlp"
        assert "x" not in job["metadata"]["labels"]
