"""The fleet's counters: no ending goes unseen by Prometheus' increase(), which needs a 0 before the 1."""

import runpy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from pydantic_core import to_json

from finetune_api import exit_codes
from finetune_operator.core.objects.observed import KEPT_BYTES, KEPT_PROGRESS_BYTES, JobObject
from finetune_operator.observability.job_metrics import KEPT_WITHOUT_JOBS, REASONS, JobMetrics, final_progress
from finetune_operator.observability.metrics import Metrics, Readings

ROOT = Path(__file__).resolve().parents[3]
NOW = datetime(2026, 11, 1, tzinfo=UTC)
ENDED = "finetune_operator_attempts_ended_total"


def job(namespace: str, *reasons: str | None) -> JobObject:
    """A job with one attempt for each reason; None: it runs."""
    attempts: list[dict[str, Any]] = [
        {"number": number, "jobName": f"nli-{number}", **({"reason": reason} if reason else {})}
        for number, reason in enumerate(reasons, 1)
    ]
    metadata = {"name": "nli", "namespace": namespace, "uid": "1"}
    return JobObject.from_api({"metadata": metadata, "spec": {}, "status": {"attempts": attempts}})


def fleet(*jobs: JobObject) -> tuple[JobMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    return JobMetrics(lambda: jobs, 10, lambda: NOW, registry), registry


def ended(registry: CollectorRegistry, namespace: str) -> dict[str, float]:
    samples = [s for metric in registry.collect() for s in metric.samples if s.name == ENDED]
    return {s.labels["reason"]: s.value for s in samples if s.labels["namespace"] == namespace}


def test_every_reason_is_zero_at_the_first_scrape_after_a_start() -> None:
    _, registry = fleet(job("research", "Unavailable", None), job("products"))
    assert ended(registry, "research") == ended(registry, "products") == dict.fromkeys(REASONS, 0.0)


def test_an_ending_grows_a_zero_that_was_scraped() -> None:
    before, after = job("research", None), job("research", "TrainerCrashed")
    one, registry = fleet(before)
    assert ended(registry, "research")["TrainerCrashed"] == 0
    one.record_status(before, after)
    one.record_status(after, after)
    assert {reason: n for reason, n in ended(registry, "research").items() if n} == {"TrainerCrashed": 1}


def test_a_job_whose_namespace_was_never_scraped_counts_all_the_same() -> None:
    one, registry = fleet()
    one.record_status(job("new", None), job("new", "DatasetInvalid"))
    assert ended(registry, "new") == {**dict.fromkeys(REASONS, 0.0), "DatasetInvalid": 1}


def test_zeros_stay_when_the_last_job_of_a_namespace_is_gone() -> None:
    jobs = [job("research")]
    registry = CollectorRegistry()
    JobMetrics(lambda: jobs, 10, lambda: NOW, registry)
    generate_latest(registry)
    jobs.clear()
    assert ended(registry, "research") == dict.fromkeys(REASONS, 0.0)


def test_counters_of_a_namespace_that_has_long_had_no_job_are_removed() -> None:
    jobs, now = [job("research"), job("products")], [NOW]
    registry = CollectorRegistry()
    one = JobMetrics(lambda: jobs, 10, lambda: now[0], registry)
    one.record_status(job("brief", None), job("brief", "DatasetInvalid"))
    generate_latest(registry)
    jobs.pop(0)
    now[0] += KEPT_WITHOUT_JOBS
    assert ended(registry, "research") == ended(registry, "products") == dict.fromkeys(REASONS, 0.0)
    now[0] += timedelta(seconds=1)
    generate_latest(registry)
    text = generate_latest(registry).decode()
    assert 'namespace="products"' in text
    assert 'namespace="research"' not in text
    assert 'namespace="brief"' not in text


def test_all_reasons_an_attempt_can_end_with_are_shown() -> None:
    explained = runpy.run_path(str(ROOT / "scripts" / "operator_reasons.py"))["ATTEMPTS"]  # kept complete by tests/docs
    assert set(REASONS) == {*exit_codes.REASONS, *explained}


@pytest.mark.parametrize("more", [{"spec": {"image": "i" * KEPT_BYTES}}, {"attempts": [{"message": "m" * KEPT_BYTES}]}])
def test_a_job_too_large_to_stay_in_memory_keeps_its_final_values(more: dict[str, Any]) -> None:
    metadata = {"name": "nli", "namespace": "a", "uid": "1", "resourceVersion": "1"}
    status = {"phase": "Failed", "progress": {"step": 3, "loss": 0.5}, "attempts": more.get("attempts", [])}
    whole = JobObject.from_api({"metadata": metadata, "spec": more.get("spec", {}), "status": status})
    kept = whole.kept()
    assert (kept.is_whole, kept.spec) == (False, b"{}")
    assert len(kept.status) <= KEPT_PROGRESS_BYTES
    assert [progress.step for _, progress in final_progress([kept], 2)] == [3]
    bloated = replace(whole, status=to_json({"progress": {"summary": "x" * KEPT_BYTES}}))
    assert bloated.kept().status == b"{}"


def test_finished_jobs_keep_their_final_values_the_latest_up_to_the_limit() -> None:
    def finished(number: int, phase: str = "Succeeded") -> JobObject:
        progress = {"step": number, "totalSteps": 9, "percent": 100, "loss": 0.5, "tokensPerSecond": 7}
        metadata = {"name": f"nli-{number}", "namespace": "a", "uid": str(number), "resourceVersion": str(number)}
        return JobObject.from_api({"metadata": metadata, "status": {"phase": phase, "progress": progress}})

    jobs = [finished(3), finished(1), finished(4, "Training"), finished(2, "Failed")]
    found = dict(final_progress(jobs, 2))
    assert [(key.name, progress.step) for key, progress in found.items()] == [("nli-3", 3), ("nli-2", 2)]
    assert {progress.tokens_per_second for progress in found.values()} == {None}, "it has no pace any more"
    assert list(final_progress(jobs[2:3], 2)) == []
    metrics = Metrics()
    readings = Readings({}, dict, dict, dict, lambda: [*final_progress(jobs, 1), *found.items()])
    metrics.watch(readings)
    samples = {
        s.name: s.value for m in metrics.registry.collect() for s in m.samples if s.labels.get("name") == "nli-3"
    }
    prefix = "finetune_operator_job"
    assert samples == {
        f"{prefix}_step": 3,
        f"{prefix}_steps": 9,
        f"{prefix}_progress_ratio": 1,
        f"{prefix}_loss": 0.5,
    }


def trial(
    sweep: str,
    name: str,
    phase: str,
    loss: float | None,
    gpus: int = 1,
    version: int = 1,
    rows: list[dict[str, Any]] | None = None,
) -> JobObject:
    owner = {"kind": "FineTuneSweep", "name": sweep, "uid": "7", "controller": True}
    metadata = {"name": f"{sweep}-{name}", "namespace": "research", "resourceVersion": str(version)}
    progress = {"step": 20} | ({"evalLoss": loss} if loss is not None else {})
    status = {"phase": phase, "progress": progress, "trials": rows or []}
    spec = {"resources": {"gpusPerNode": gpus}, **({"pack": {"sweep": sweep}} if rows else {})}
    return JobObject.from_api({"metadata": metadata | {"ownerReferences": [owner]}, "spec": spec, "status": status})


def values(registry: CollectorRegistry, name: str) -> dict[str, float]:
    samples = [s for metric in registry.collect() for s in metric.samples if s.name == f"finetune_operator_{name}"]
    labels = ("sweep", "trial", "phase")
    return {"/".join(s.labels[key] for key in labels if key in s.labels): s.value for s in samples if s.value}


def test_the_trials_of_a_sweep_have_their_losses_and_their_sweep_its_gpus() -> None:
    jobs = (
        trial("rates", "lr1", "Training", 0.5, gpus=2),
        trial("rates", "lr2", "Succeeded", 0.3),
        trial("rates", "lr3", "Pending", None),
        job("research", None),
    )
    _, registry = fleet(*jobs)
    assert values(registry, "trial_eval_loss") == {"rates/lr1": 0.5, "rates/lr2": 0.3}
    assert values(registry, "trial_step") == {"rates/lr1": 20, "rates/lr2": 20, "rates/lr3": 20}
    assert values(registry, "sweep_gpus_allocated") == {"rates": 2}
    assert values(registry, "sweep_trials") == {"rates/Training": 1, "rates/Succeeded": 1, "rates/Pending": 1}


def test_each_trial_of_a_pack_is_shown_and_its_gpu_counted_once() -> None:
    rows = [
        {"name": "lr1", "phase": "Running", "step": 20, "evalLoss": 0.5},
        {"name": "lr2", "phase": "Stopped", "step": 10, "evalLoss": 0.9},
        {"name": "lr3"},
    ]
    pack = trial("rates", "pack-0", "Training", None, rows=rows)
    _, registry = fleet(pack, trial("rates", "lr4", "Succeeded", 0.3))
    assert values(registry, "trial_eval_loss") == {"rates/lr1": 0.5, "rates/lr2": 0.9, "rates/lr4": 0.3}
    assert values(registry, "trial_step") == {"rates/lr1": 20, "rates/lr2": 10, "rates/lr4": 20}
    assert values(registry, "sweep_gpus_allocated") == {"rates": 1}
    phases = {"Training": 1, "Suspended": 1, "Pending": 1, "Succeeded": 1}
    assert values(registry, "sweep_trials") == {f"rates/{phase}": count for phase, count in phases.items()}


def test_of_many_trials_the_latest_are_shown_and_their_sweeps_counted_whole() -> None:
    old = [trial(f"old-{number}", "a", "Training", 0.9) for number in range(30)]
    new = [trial("new", f"t{number}", "Training", 0.5, version=9) for number in range(25)]
    _, registry = fleet(*old, *new)
    assert len(values(registry, "trial_eval_loss")) == 10
    assert values(registry, "sweep_trials") == {"new/Training": 25}
    assert values(registry, "sweep_gpus_allocated") == {"new": 25}
