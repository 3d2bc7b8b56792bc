"""Why an attempt is not running yet, in Kubernetes' own words."""

from collections.abc import Sequence

from finetune_api import names
from finetune_operator.core.observed import Child, JobObject, Notice, Observed, Pod

PENDING = "Pending"
QUEUED = "Queued"
UNSCHEDULABLE = "Unschedulable"
#: Container states that are merely a step on the way.
_ON_THE_WAY = ("", "ContainerCreating", "PodInitializing")


def explain(observed: Observed, child: Child, pods: Sequence[Pod], nodes: int) -> Notice:
    """The most telling reason; it comes from the scheduler, the kubelet, the Job controller or Kueue."""
    if child.suspended:
        return _queued(observed.job, child, observed.notices)
    waiting = [pod for pod in pods if pod.live and not pod.running]
    for look in (_unschedulable, _container):
        for pod in waiting:
            if notice := look(pod):
                return notice
    for uid in (*(pod.uid for pod in waiting), child.uid):
        if (notice := observed.notices.get(uid)) and (waiting or not pods):
            return notice
    running = sum(pod.running for pod in pods)
    if running and nodes > 1:
        return Notice(PENDING, f"{running} of {nodes} pods run; waiting for the others")
    if any(pod.live and pod.deleting for pod in pods) or (pods and not any(pod.live for pod in pods)):
        return Notice(PENDING, "a pod was lost; Kubernetes is replacing it")
    return Notice(PENDING, starting(child.name, nodes))


def starting(job_name: str, nodes: int) -> str:
    return f"waiting for the pod{'s' if nodes > 1 else ''} of Job {job_name} to start"


def _queued(job: JobObject, child: Child, notices: dict[str, Notice]) -> Notice:
    said = notices.get(child.uid)
    if not child.queued:
        return Notice(QUEUED, f"Job {child.name} was suspended by someone else")
    queue = job.queue_labels.get(names.LABEL_KUEUE_QUEUE, "")
    where = f"queue {queue}" if queue else "its queue"
    return Notice(
        QUEUED, f"waiting in {where}: {said.message}" if said else f"waiting for Kueue to admit it to {where}"
    )


def _unschedulable(pod: Pod) -> Notice | None:
    return Notice(UNSCHEDULABLE, pod.unschedulable) if pod.unschedulable else None


def _container(pod: Pod) -> Notice | None:
    reason, message = pod.waiting
    return None if reason in _ON_THE_WAY else Notice(reason, message or f"the container waits: {reason}")
