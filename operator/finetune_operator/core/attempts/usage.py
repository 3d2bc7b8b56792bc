"""GPU-hours that the attempts of a job have used, and what they cost. They change only when an attempt ends."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from finetune_api import constants
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import MAX_USAGE, Attempt, FineTuneJobStatus, Usage
from finetune_operator.core.attempts import pod_set
from finetune_operator.settings import Settings

_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


def required_gpu(spec: FineTuneJobSpec, node_selector: Mapping[str, str]) -> str | None:
    """Return the type of GPU that the scheduler guarantees to the pods; None where they do not require one."""
    return {**(spec.resources.node_selector or {}), **node_selector}.get(constants.LABEL_GPU_PRODUCT)


def gpu_type(name: str | None, spec: FineTuneJobSpec) -> str | None:
    """Return the type of a GPU of that name, of which the job may ask for a part: a part has no price of the whole.

    Where a device plugin offers parts as resources of their own, the node's label, and of a GPU that is shared in time
    the trainer too, names the whole. The endings are those of NVIDIA's labels.
    """
    part = spec.resources.gpu_resource.rpartition("/")[2]
    if name and part.startswith("mig-") and "-MIG-" not in name:
        name = f"{name}-MIG-{part.removeprefix('mig-')}"
    if name and part.endswith(".shared") and not name.endswith("-SHARED"):
        name = f"{name}-SHARED"
    return name[:63] if name else None


def update(known: FineTuneJobStatus, new: FineTuneJobStatus, spec: FineTuneJobSpec, settings: Settings) -> Usage | None:
    """Return the usage with that of the attempts that end in `new` but not in `known`, at the prices of now."""
    gpus, before = spec.resources.nodes * spec.resources.gpus_per_node, known.usage or Usage()
    earlier = new.earlier_attempts
    ended = [attempt for attempt in new.attempts if attempt.reason]
    if not gpus or not (ended or earlier):
        return known.usage
    recorded = {attempt.job_name for attempt in known.attempts if attempt.reason}
    cost, priced = before.cost, before.priced_gpu_hours
    for attempt in ended:
        price = settings.gpu_prices.get(attempt.gpu or "")
        # Sums of two currencies would be a wrong price: what ends after the administrator changed it has none.
        if attempt.job_name in recorded or price is None or before.currency not in (None, settings.currency):
            continue
        hours = _hours(gpus, [attempt])
        cost, priced = _sum(cost, hours * price), _sum(priced, hours)
    total = _hours(gpus, ended) + (gpus * earlier.run_seconds / 3600 if earlier else 0.0)
    return Usage(
        gpu_hours=_sum(0.0, total),
        cost=cost,
        currency=before.currency or (settings.currency if cost is not None else None),
        priced_gpu_hours=priced,
    )


def _hours(gpus: int, attempts: Sequence[Attempt]) -> float:
    return gpus * pod_set.run_seconds(attempts, None, _LONG_AGO) / 3600


def _sum(known: float | None, more: float) -> float:
    """Return the sum, with the digits that people read."""
    return round(min((known or 0.0) + more, MAX_USAGE), 4)
