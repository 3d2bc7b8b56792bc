"""Explain why an attempt is not running yet, with the messages of Kubernetes."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from finetune_api import constants
from finetune_operator.core.objects.observed import Child, JobObject, Observed, WaitReason
from finetune_operator.core.objects.pod import Pod

PENDING = "Pending"
QUEUED = "Queued"
UNSCHEDULABLE = "Unschedulable"
UNREACHABLE = "NodeUnreachable"
PARALLELISM_CHANGED = "ParallelismChanged"
OUTPUT_IN_USE = "OutputInUse"
#: More is said of a pod that starts only after this time: most take less, and each change is a write.
_SOON = timedelta(seconds=10)
#: Container states of a normal start.
_ON_THE_WAY = ("", "ContainerCreating", "PodInitializing")


def output_in_use(uri: str, holder: str) -> WaitReason:
    """Return why a job does not begin while another writes to the same output."""
    return WaitReason(
        OUTPUT_IN_USE,
        f"spec.output.uri: {uri} is where job {holder} writes, which is not over: give this job its own ({{name}} in it"
        f" stands for the job's name), or wait for {holder}",
    )


def explain(observed: Observed, child: Child, pods: Sequence[Pod], nodes: int, now: datetime) -> WaitReason:
    """Return the most specific reason: of the scheduler, the kubelet, the Job controller or Kueue.

    Args:
        observed: The job.
        child: The Job of the attempt.
        pods: The last pod of each rank.
        nodes: Number of pods that the attempt needs.
        now: The time.
    """
    if child.suspended:
        return _queued(observed.job, child, observed.wait_reasons)
    if child.parallelism < nodes:
        said = f"somebody else set parallelism of Job {child.name} to {child.parallelism}: set it back to {nodes}"
        return WaitReason(PARALLELISM_CHANGED, f"{said}, or delete the Job for a new attempt")
    waiting = [pod for pod in pods if pod.live and not pod.running]
    if reason := _first(_unschedulable, waiting):
        return reason
    if reason := _first(_container, waiting):
        return reason
    if reason := _from_events(observed.wait_reasons, child, pods, waiting):
        return reason
    for pod in waiting:
        if pod.init and pod.init.running:
            return WaitReason(PENDING, f"init container {pod.init.name} of pod {pod.name} is running")
    running = sum(pod.running for pod in pods)
    if running and nodes > 1:
        return WaitReason(PENDING, f"{running} of {nodes} pods run; waiting for the others")
    if any(pod.live and pod.deleting for pod in pods) or (pods and not any(pod.live for pod in pods)):
        return WaitReason(PENDING, "a pod was lost; Kubernetes is replacing it")
    if slow := next((pod for pod in waiting if now - pod.created_at >= _SOON), None):
        return WaitReason(PENDING, _slow(slow, observed.job.namespace))
    return WaitReason(PENDING, starting(observed.job, child.name, nodes))


def tells_more_at(pods: Sequence[Pod]) -> datetime | None:
    """Return when there is more to say of pods that start, should they not run by then."""
    return min((pod.created_at + _SOON for pod in pods if pod.live and not pod.running), default=None)


def _first(look: Callable[[Pod], WaitReason | None], pods: Sequence[Pod]) -> WaitReason | None:
    return next((reason for pod in pods if (reason := look(pod))), None)


def starting(job: JobObject, name: str, nodes: int) -> str:
    """Return why an attempt does not run whose Job `name` has just been created."""
    pods = "pods" if nodes > 1 else "pod"
    return (
        f"waiting for the {pods} of Job {name} to start; if this lasts: kubectl describe job {name} -n {job.namespace}"
    )


def _slow(pod: Pod, namespace: str) -> str:
    """Return what a pod waits for of which neither the scheduler nor the kubelet has said anything."""
    if not pod.node:
        why = f"no scheduler has placed pod {pod.name} on a node yet, nor said why not: see that one runs"
    else:
        doing = "pulls the image" if pod.set_up else "pulls the image and mounts the volumes"
        why = f"node {pod.node} prepares pod {pod.name}: it {doing}"
    return f"{why}; if this lasts: kubectl describe pod {pod.name} -n {namespace}"


def unreachable(pod: Pod) -> WaitReason:
    """Return the reason for a pod whose node has not confirmed that it stopped."""
    node = f"node {pod.node}" if pod.node else "its node"
    by = pod.stop_by.isoformat(timespec="seconds").replace("+00:00", "Z") if pod.stop_by else "now"
    return WaitReason(
        UNREACHABLE,
        f"Pod {pod.name} was due to stop by {by}, but {node} has not confirmed it; the next attempt waits for the node "
        "to return or be removed",
    )


def _from_events(
    wait_reasons: dict[str, WaitReason], child: Child, pods: Sequence[Pod], waiting: Sequence[Pod]
) -> WaitReason | None:
    """Return the reason that an event gives. Nobody retracts an event, so skip one whose cause is gone."""
    for pod in waiting:
        if (reason := wait_reasons.get(pod.uid)) and not pod.set_up:
            return reason
    reason = wait_reasons.get(child.uid)
    made = max((pod.created_at for pod in pods), default=None)
    is_past = reason and reason.at and made and reason.at < made
    if reason and reason.reason != QUEUED and not is_past and not any(pod.live for pod in pods):
        return reason
    return None


def _queued(job: JobObject, child: Child, wait_reasons: dict[str, WaitReason]) -> WaitReason:
    said = wait_reasons.get(child.uid)
    if not child.queued:
        return WaitReason(QUEUED, f"Job {child.name} was suspended by someone else")
    queue = job.queue_labels.get(constants.LABEL_KUEUE_QUEUE, "")
    where = f"queue {queue}" if queue else "its queue"
    if said is None or said.reason != QUEUED:
        return WaitReason(QUEUED, f"waiting for Kueue to admit it to {where}")
    return WaitReason(QUEUED, f"waiting in {where}: {said.message}")


def _unschedulable(pod: Pod) -> WaitReason | None:
    return WaitReason(UNSCHEDULABLE, pod.unschedulable) if pod.unschedulable else None


def _container(pod: Pod) -> WaitReason | None:
    """Return the kubelet's reason, of an init container before the trainer's."""
    if pod.init and pod.init.waiting[0] not in _ON_THE_WAY:
        reason, message = pod.init.waiting
        return WaitReason(reason, f"init container {pod.init.name}: {message or reason}")
    reason, message = pod.waiting
    return None if reason in _ON_THE_WAY else WaitReason(reason, message or f"the container waits: {reason}")
