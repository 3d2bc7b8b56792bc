"""Decides what the Job controller would do next. Pure: a Job and its pods in, one step out.

After k8s.io/kubernetes/pkg/controller/job (1.36): counts, Indexed completion, podFailurePolicy, podReplacementPolicy,
suspend, activeDeadlineSeconds, and the conditions FailureTarget and SuccessCriteriaMet ahead of Failed and Complete.
Not played: success policies, per-index backoff, backoff between replacements, TTL.
"""

import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

Object = dict[str, Any]

TRACKING_FINALIZER = "batch.kubernetes.io/job-tracking"
INDEX_KEY = "batch.kubernetes.io/job-completion-index"


@dataclass
class Step:
    """What to do: write the status, create pods, delete pods, and take the finalizer off pods that are counted.

    `drop` are pods to delete without counting how they end (the finalizer comes off first).
    """

    status: Object | None = None
    create: list[Object] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    release: list[str] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    look_again_seconds: float | None = None


@dataclass(frozen=True)
class _Failure:
    reason: str
    message: str


def is_over(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def is_finished(job: Object) -> bool:
    return any(_has(job.get("status") or {}, kind) for kind in ("Complete", "Failed"))


def decide(job: Object, pods: list[Object], counted: set[str], now: datetime, suffix: Any) -> Step:
    """One step for `job`, whose pods are `pods`; `counted` are the uids already in its status.

    `suffix()` makes the random end of a pod's name.
    """
    over = [pod for pod in pods if is_over(pod)]
    active = [pod for pod in pods if not is_over(pod) and not pod["metadata"].get("deletionTimestamp")]
    stopping = [pod for pod in pods if not is_over(pod) and pod["metadata"].get("deletionTimestamp")]
    step = Step()
    if is_finished(job):
        step.delete = [_name(pod) for pod in active]
        step.release = [_name(pod) for pod in over if _is_tracked(pod)]
        return step
    status = copy.deepcopy(job.get("status") or {})
    fresh = [pod for pod in over if _is_tracked(pod) and pod["metadata"]["uid"] not in counted]
    failure = _count(job, status, fresh) or _known_failure(status) or _backoff_failure(job, status)
    failure = failure or _deadline_failure(job, status, now, step)
    step.counted = [pod["metadata"]["uid"] for pod in fresh]
    step.release = [_name(pod) for pod in over if _is_tracked(pod)]
    done = status.get("succeeded", 0) >= job["spec"].get("completions", 1)
    if failure or done:
        step.delete = [_name(pod) for pod in active]
        _finish(status, failure, bool(active or stopping), now)
        active = []
    elif job["spec"].get("suspend"):
        step.drop = [_name(pod) for pod in active]
        active = []
        _set(status, "Suspended", "True", "JobSuspended", "Job suspended", now)
        status.pop("startTime", None)
    else:
        if _has(status, "Suspended"):
            _set(status, "Suspended", "False", "JobResumed", "Job resumed", now)
            status.pop("startTime", None)
        status.setdefault("startTime", _time(now))
        step.create = _missing_pods(job, status, active, stopping, suffix)
    status["active"] = len(active) + len(step.create)
    status["terminating"] = len(stopping) + len(step.delete) + len(step.drop)
    status["ready"] = sum(1 for pod in active if _has(pod.get("status") or {}, "Ready"))
    if is_finished({"status": status}):
        status |= {"active": 0, "terminating": 0, "ready": 0}
    step.status = status if status != job.get("status") else None
    return step


def _name(pod: Object) -> str:
    return str(pod["metadata"]["name"])


def _is_tracked(pod: Object) -> bool:
    return TRACKING_FINALIZER in (pod["metadata"].get("finalizers") or [])


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _has(status: Object, kind: str) -> bool:
    return any(c["type"] == kind and c["status"] == "True" for c in status.get("conditions") or [])


def _set(status: Object, kind: str, value: str, reason: str, message: str, now: datetime) -> None:
    conditions = status.setdefault("conditions", [])
    if any(c["type"] == kind and c["status"] == value for c in conditions):
        return
    status["conditions"] = [c for c in conditions if c["type"] != kind]
    entry = {"type": kind, "status": value, "reason": reason, "message": message}
    status["conditions"].append(entry | {"lastProbeTime": _time(now), "lastTransitionTime": _time(now)})


def _count(job: Object, status: Object, fresh: list[Object]) -> _Failure | None:
    """Add the pods that ended to the status; the first that a FailJob rule matches is the Job's failure."""
    failure = None
    indexes = _parse_indexes(status.get("completedIndexes", ""))
    for pod in fresh:
        if pod["status"]["phase"] == "Succeeded":
            if job["spec"].get("completionMode") == "Indexed":
                indexes.add(_index(pod))
                status["completedIndexes"] = ",".join(map(str, sorted(indexes)))
                status["succeeded"] = len(indexes)
            else:
                status["succeeded"] = status.get("succeeded", 0) + 1
            continue
        action, message = _policy(job, pod)
        if action == "FailJob":
            failure = failure or _Failure("PodFailurePolicy", message)
        if action != "Ignore":
            status["failed"] = status.get("failed", 0) + 1
    return failure


def _parse_indexes(text: str) -> set[int]:
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _index(pod: Object) -> int:
    return int(pod["metadata"]["annotations"][INDEX_KEY])


def _policy(job: Object, pod: Object) -> tuple[str, str]:
    """The action of the first rule that matches the failed pod, and the sentence that says so."""
    place = f"{pod['metadata']['namespace']}/{_name(pod)}"
    for number, rule in enumerate((job["spec"].get("podFailurePolicy") or {}).get("rules", [])):
        end = f"matching {rule['action']} rule at index {number}"
        codes = rule.get("onExitCodes")
        if codes:
            for container in pod["status"].get("containerStatuses") or []:
                code = (container["state"].get("terminated") or {}).get("exitCode", 0)
                named = codes.get("containerName") in (None, container["name"])
                if code and named and (code in codes["values"]) == (codes["operator"] == "In"):
                    return rule[
                        "action"
                    ], f"Container {container['name']} for pod {place} failed with exit code {code} {end}"
        for wanted in rule.get("onPodConditions") or []:
            for condition in pod["status"].get("conditions") or []:
                same_status = condition["status"] == wanted.get("status", "True")
                if condition["type"] == wanted["type"] and same_status:
                    return rule["action"], f"Pod {place} has condition {wanted['type']} {end}"
    return "Count", ""


def _known_failure(status: Object) -> _Failure | None:
    found = next((c for c in status.get("conditions") or [] if c["type"] == "FailureTarget"), None)
    return _Failure(found["reason"], found["message"]) if found else None


def _backoff_failure(job: Object, status: Object) -> _Failure | None:
    if status.get("failed", 0) > job["spec"].get("backoffLimit", 6):
        return _Failure("BackoffLimitExceeded", "Job has reached the specified backoff limit")
    return None


def _deadline_failure(job: Object, status: Object, now: datetime, step: Step) -> _Failure | None:
    limit = job["spec"].get("activeDeadlineSeconds")
    if not limit or not status.get("startTime") or job["spec"].get("suspend"):
        return None
    left = datetime.fromisoformat(status["startTime"]) + timedelta(seconds=limit) - now
    if left > timedelta():
        step.look_again_seconds = left.total_seconds() + 0.1
        return None
    return _Failure("DeadlineExceeded", "Job was active longer than specified deadline")


def _finish(status: Object, failure: _Failure | None, pods_left: bool, now: datetime) -> None:
    """The interim condition at once, the final one when no pod runs any more."""
    status.setdefault("startTime", _time(now))
    interim, final = ("FailureTarget", "Failed") if failure else ("SuccessCriteriaMet", "Complete")
    end = failure or _Failure("CompletionsReached", "Reached expected number of succeeded pods")
    _set(status, interim, "True", end.reason, end.message, now)
    if pods_left:
        return
    _set(status, final, "True", end.reason, end.message, now)
    if not failure:
        status["completionTime"] = _time(now)


def _missing_pods(
    job: Object, status: Object, active: list[Object], stopping: list[Object], suffix: Any
) -> list[Object]:
    """The pods to create now. With podReplacementPolicy Failed a pod is replaced only when it is over."""
    spec = job["spec"]
    there = active + (stopping if spec.get("podReplacementPolicy") == "Failed" else [])
    left = spec.get("completions", 1) - status.get("succeeded", 0)
    count = min(spec.get("parallelism", 1), left) - len(there)
    if spec.get("completionMode") != "Indexed":
        return [_pod(job, None, suffix()) for _ in range(count)]
    taken = {_index(pod) for pod in there} | _parse_indexes(status.get("completedIndexes", ""))
    free = [index for index in range(spec.get("completions", 1)) if index not in taken]
    return [_pod(job, index, suffix()) for index in free[: max(count, 0)]]


def _pod(job: Object, index: int | None, suffix: str) -> Object:
    template = copy.deepcopy(job["spec"]["template"])
    name, spec = job["metadata"]["name"], template["spec"]
    metadata = template.get("metadata") or {}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"]}
    full_name = f"{name}-{suffix}" if index is None else f"{name}-{index}-{suffix}"
    new = {
        "name": full_name,
        "namespace": job["metadata"]["namespace"],
        "labels": dict(metadata.get("labels") or {}),
        "annotations": dict(metadata.get("annotations") or {}),
        "finalizers": [TRACKING_FINALIZER],
        "ownerReferences": [owner | {"controller": True, "blockOwnerDeletion": True}],
    }
    if index is not None:
        new["labels"][INDEX_KEY] = new["annotations"][INDEX_KEY] = str(index)
        spec["hostname"] = f"{name}-{index}"
        source = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX_KEY}']"}}
        for container in spec["containers"]:
            container.setdefault("env", []).append({"name": "JOB_COMPLETION_INDEX", "valueFrom": source})
    return {"apiVersion": "v1", "kind": "Pod", "metadata": new, "spec": spec}
