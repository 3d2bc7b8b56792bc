"""Why an attempt is not running yet, in Kubernetes' own words."""

from collections.abc import Sequence

from finetune_api import constants
from finetune_operator.core.objects.observed import (
    Child,
    JobObject,
    Notice,
    Observed,
    Pod,
)

PENDING = "Pending"
QUEUED = "Queued"
UNSCHEDULABLE = "Unschedulable"
UNREACHABLE = "NodeUnreachable"
#: Container states that are merely a step on the way.
_ON_THE_WAY = ("", "ContainerCreating", "PodInitializing")


def explain(observed: Observed, child: Child, pods: Sequence[Pod], nodes: int) -> Notice:
    """The most telling reason; it comes from the scheduler, the kubelet, the Job controller or Kueue. `pods` are the
    last of each rank.
    """
    if child.suspended:
        return _queued(observed.job, child, observed.notices)
    waiting = [pod for pod in pods if pod.live and not pod.running]
    for look in (_unschedulable, _container):
        for pod in waiting:
            if notice := look(pod):
                return notice
    if notice := _told(observed.notices, child, pods, waiting):
        return notice
    running = sum(pod.running for pod in pods)
    if running and nodes > 1:
        return Notice(PENDING, f"{running} of {nodes} pods run; waiting for the others")
    if any(pod.live and pod.deleting for pod in pods) or (pods and not any(pod.live for pod in pods)):
        return Notice(PENDING, "a pod was lost; Kubernetes is replacing it")
    return Notice(PENDING, starting(child.name, nodes))


def starting(job_name: str, nodes: int) -> str:
    return f"waiting for the pod{'s' if nodes > 1 else ''} of Job {job_name} to start"


def out_of_reach(pod: Pod) -> Notice:
    """A pod that should have stopped, and of which its node says nothing."""
    node = f"node {pod.node}" if pod.node else "its node"
    by = pod.stop_by.isoformat(timespec="seconds").replace("+00:00", "Z") if pod.stop_by else "now"
    return Notice(
        UNREACHABLE,
        f"pod {pod.name} was to stop by {by}, and {node} has not said that it did. It may still write, so nothing new "
        "starts until the node is back or removed",
    )


def _told(notices: dict[str, Notice], child: Child, pods: Sequence[Pod], waiting: Sequence[Pod]) -> Notice | None:
    """What an event says. Nobody takes an event back, so one whose cause is gone is passed over."""
    for pod in waiting:
        if (notice := notices.get(pod.uid)) and not pod.set_up:
            return notice
    notice = notices.get(child.uid)
    made = max((pod.created_at for pod in pods), default=None)
    is_past = notice and notice.at and made and notice.at < made
    if notice and notice.reason != QUEUED and not is_past and not any(pod.live for pod in pods):
        return notice
    return None


def _queued(job: JobObject, child: Child, notices: dict[str, Notice]) -> Notice:
    said = notices.get(child.uid)
    if not child.queued:
        return Notice(QUEUED, f"Job {child.name} was suspended by someone else")
    queue = job.queue_labels.get(constants.LABEL_KUEUE_QUEUE, "")
    where = f"queue {queue}" if queue else "its queue"
    if said is None or said.reason != QUEUED:
        return Notice(QUEUED, f"waiting for Kueue to admit it to {where}")
    return Notice(QUEUED, f"waiting in {where}: {said.message}")


def _unschedulable(pod: Pod) -> Notice | None:
    return Notice(UNSCHEDULABLE, pod.unschedulable) if pod.unschedulable else None


def _container(pod: Pod) -> Notice | None:
    reason, message = pod.waiting
    return None if reason in _ON_THE_WAY else Notice(reason, message or f"the container waits: {reason}")
