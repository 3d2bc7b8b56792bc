"""What jobs are compared by: their label, and how they ended; bounded whatever trainers report."""

from datetime import UTC, datetime

from prometheus_client import CollectorRegistry

from finetune_operator.core import controllers
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.observability.job_metrics import JobMetrics


def _job(name: str, version: int, phase: str, metrics: dict[str, float], team: str = "nlp") -> JobObject:
    metadata = {"name": name, "namespace": "a", "uid": name, "labels": {"team": team}, "resourceVersion": str(version)}
    status = {"phase": phase, "metrics": metrics}
    found = controllers.registry("team")["FineTuneJob"].view({"metadata": metadata, "spec": {}, "status": status})
    assert isinstance(found, JobObject)
    return found


def _values(jobs: list[JobObject], name: str, limit: int = 2) -> dict[str, float]:
    registry = CollectorRegistry()
    JobMetrics(lambda: jobs, limit, lambda: datetime.now(UTC), registry)
    samples = [s for metric in registry.collect() for s in metric.samples if s.name == f"finetune_operator_{name}"]
    return {"/".join(s.labels.values()): s.value for s in samples}


def test_a_finished_job_shows_its_final_metrics_and_a_running_one_none() -> None:
    final = {"evalLoss": 0.5, "evalLossBefore": 2.0, "accuracy": 0.9, "confusion.a.b": 3.0}
    jobs = [_job("done", 1, "Succeeded", final), _job("runs", 2, "Training", {"evalLoss": 0.7})]
    assert _values(jobs, "job_result") == {"a/done/evalLoss": 0.5, "a/done/evalLossBefore": 2.0, "a/done/accuracy": 0.9}
    assert _values(jobs, "job_info") == {"a/done/nlp": 1.0, "a/runs/nlp": 1.0}


def test_the_latest_jobs_are_shown_and_no_more() -> None:
    jobs = [_job(f"j{n}", n, "Succeeded", {"evalLoss": n}, team=f"t{n}") for n in range(9)]
    assert _values(jobs, "job_result") == {"a/j7/evalLoss": 7, "a/j8/evalLoss": 8}
    assert _values(jobs, "job_info") == {"a/j7/t7": 1, "a/j8/t8": 1}
