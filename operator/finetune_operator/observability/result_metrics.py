"""Prometheus gauges by which jobs are compared: the label they are told apart by, and how those that are over ended."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from prometheus_client.core import Metric

from finetune_operator.core.objects import status_io
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.observability.metrics import gauge

_NAMES: Final = ("trainLoss", "evalLoss", "accuracy", "precision", "recall", "f1", "validJson", "tokensPerSecond")
#: Of status.metrics, what is exported: a trainer may report as many as it likes.
EXPORTED: Final = frozenset(_NAMES) | {f"{name}Before" for name in _NAMES}


def of_jobs(finished: Sequence[JobObject], others: Iterable[JobObject]) -> Iterator[Metric]:
    """Yield the gauges of jobs that are over, and of others."""
    labels = {(job.namespace, job.name, job.cost_label): 1.0 for job in (*finished, *others)}
    text = "1, with the value of the job's label that costs.label names."
    yield gauge("job_info", text, ("namespace", "name", "cost_label"), labels)
    results = {
        (job.namespace, job.name, name): value
        for job in finished
        for name, value in (status_io.read(job.status).metrics or {}).items()
        if name in EXPORTED
    }
    text = "Final value of a metric of a job that is over, as in status.metrics."
    yield gauge("job_result", text, ("namespace", "name", "metric"), results)
