"""What Kubernetes, Kueue and users do to one FineTuneJob and its children, in memory and at a word: the other half of
world.py. Every change goes into its kind's stream, as a watch would show it.
"""

import json
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api import constants
from finetune_operator.core.objects import raw
from support.simulation.copies import copied

Object = dict[str, Any]
START = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
KINDS = (constants.KIND, "Job", "Pod")
GRACE_SECONDS = 120


def stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def is_shown(kind: str, obj: Object) -> bool:
    """Whether the operator's watch of that kind selects the object."""
    return kind == constants.KIND or constants.LABEL_JOB in raw.labels(obj)


def _reference(obj: Object) -> Object:
    return {"name": obj["metadata"]["name"], "uid": obj["metadata"]["uid"]}


class ImaginedCluster:
    """One FineTuneJob and its children. Times move only when the test says so."""

    def __init__(self, labels: dict[str, str] | None = None, **spec: Any) -> None:
        self.now = START
        self.version = 1
        self.uids = 0
        self.streams: dict[str, deque[tuple[str, Object]]] = {kind: deque() for kind in KINDS}
        self.jobs: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.others: dict[str, Object] = {}
        self.hidden: set[str] = set()
        minimal = {
            "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
            "dataset": {"train": "s3://data/train.jsonl"},
            "output": {"uri": "s3://adapters/nli"},
        }
        metadata = {"name": "nli", "namespace": "team", "uid": self._uid(), "generation": 1, "labels": labels or {}}
        metadata["creationTimestamp"] = stamp(self.now)
        self.job: Object | None = {"metadata": metadata, "spec": minimal | spec}
        self.changed(constants.KIND, self.job)

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def change_spec(self, **spec: Any) -> None:
        assert self.job is not None
        self.job["spec"] |= spec
        self.job["metadata"]["generation"] += 1
        self.changed(constants.KIND, self.job)

    def delete_job(self) -> None:
        assert self.job is not None
        self._gone(constants.KIND, self.job)
        self.job = None
        for name in list(self.jobs):
            self.delete_child(name)

    def delete_child(self, name: str) -> None:
        """A Job is deleted; its pods are told to stop."""
        self._gone("Job", self.jobs.pop(name))
        self.stop_pods(name)

    def suspend_child(self, name: str, suspend: bool = True) -> None:
        """What spec.suspend of a Job does; also how Kueue admits and evicts."""
        self.jobs[name]["spec"]["suspend"] = suspend
        self.changed("Job", self.jobs[name])
        if suspend:
            self.stop_pods(name)

    def kueue_admits(self) -> None:
        for name, child in self.jobs.items():
            if self._is_queued(child) and child["spec"].get("suspend"):
                self.suspend_child(name, False)

    def kueue_evicts(self) -> None:
        for name, child in self.jobs.items():
            if self._is_queued(child) and not child["spec"].get("suspend") and not self.is_over(child):
                self.suspend_child(name)

    @staticmethod
    def _is_queued(child: Object) -> bool:
        return constants.LABEL_KUEUE_QUEUE in child["metadata"]["labels"]

    def runnable(self) -> list[str]:
        """Jobs whose pods Kubernetes would start."""
        return [n for n, child in self.jobs.items() if not child["spec"].get("suspend") and not self.is_over(child)]

    def live_pods(self) -> list[str]:
        return [name for name, pod in self.pods.items() if pod["status"]["phase"] in ("Pending", "Running")]

    def start_pods(self) -> None:
        """The Job controller makes the missing pods, and they start."""
        for name in self.runnable():
            child = self.jobs[name]
            taken = {
                pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]
                for pod in self.pods.values()
                if self._owner(pod) == child["metadata"]["uid"] and not pod["status"].get("conditions")
            }
            for index in range(child["spec"]["completions"]):
                if str(index) not in taken:
                    self.make_pod(child, index)

    def make_pod(self, child: Object, index: int = 0) -> str:
        """A running pod of `child`; its name."""
        name = f"{child['metadata']['name']}-{index}-{self.uids}"
        metadata = {
            "name": name,
            "namespace": "team",
            "uid": self._uid(),
            "labels": dict(child["spec"]["template"]["metadata"]["labels"]),
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
            "creationTimestamp": stamp(self.now),
            "ownerReferences": [{"kind": "Job", "controller": True} | _reference(child)],
        }
        container = {"name": "trainer", "state": {"running": {"startedAt": stamp(self.now)}}}
        status = {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [container]}
        self.pods[name] = {"metadata": metadata, "spec": {"nodeName": "node-1"}, "status": status}
        self.changed("Pod", self.pods[name])
        return name

    def stop_pods(self, job_name: str) -> None:
        """SIGTERM: deletionTimestamp, grace included; the end comes when `exit_pods` or `lose_pods` says so."""
        for name in self.live_pods():
            if name.startswith(f"{job_name}-"):
                self.stop_pod(name)

    def stop_pod(self, name: str) -> None:
        """One pod is told to stop."""
        by = self.now + timedelta(seconds=GRACE_SECONDS)
        told = {"deletionTimestamp": stamp(by), "deletionGracePeriodSeconds": GRACE_SECONDS}
        self.pods[name]["metadata"] = told | self.pods[name]["metadata"]
        self.changed("Pod", self.pods[name])

    def exit_pods(
        self,
        code: int,
        report: Object | None = None,
        disrupted: str = "",
        reason: str = "Error",
        message: str = "",
    ) -> None:
        """Every live pod ends with `code`; the Job controller draws its conclusion. podFailurePolicy has it replace the
        disrupted pod of a single node (see `start_pods`).
        """
        for name in self.live_pods():
            self.end_pod(name, code, json.dumps(report) if report else message, reason, disrupted)
        if not (code and disrupted and self._ignores_disruption()):
            self.conclude("Failed" if code else "Complete")
        self.remove_pods()

    def _ignores_disruption(self) -> bool:
        """The action of the first rule of podFailurePolicy, which is about DisruptionTarget."""
        jobs = [self.jobs[name] for name in self.runnable()]
        return any(job["spec"]["podFailurePolicy"]["rules"][0]["action"] == "Ignore" for job in jobs)

    def end_pod(self, name: str, code: int, message: str = "", reason: str = "Error", disrupted: str = "") -> None:
        """One pod ends; its Job has not noticed yet."""
        pod = self.pods[name]
        container = pod["status"]["containerStatuses"][0]
        began = container["state"].get("running", {}).get("startedAt", stamp(self.now))
        ended = {"exitCode": code, "reason": reason, "message": message}
        container["state"] = {"terminated": ended | {"startedAt": began, "finishedAt": stamp(self.now)}}
        pod["status"]["phase"] = "Failed" if code else "Succeeded"
        if disrupted:
            told = {"deletionTimestamp": stamp(self.now), "deletionGracePeriodSeconds": 0}
            pod["metadata"] = told | pod["metadata"]
            condition = {"type": "DisruptionTarget", "status": "True", "message": disrupted}
            pod["status"]["conditions"] = [condition | {"lastTransitionTime": stamp(self.now)}]
        self.changed("Pod", pod)

    def remove_pods(self) -> None:
        """Pods that were deleted, and are over, go."""
        for name, pod in list(self.pods.items()):
            over = pod["status"]["phase"] in ("Failed", "Succeeded")
            if pod["metadata"].get("deletionTimestamp") and over:
                self._gone("Pod", self.pods.pop(name))

    def lose_pods(self) -> None:
        """Every pod is gone without a word; the Job fails."""
        for name in list(self.pods):
            self._gone("Pod", self.pods.pop(name))
        self.conclude("Failed")

    def conclude(self, kind: str, reason: str = "", message: str = "") -> None:
        """The Job controller ends the Jobs of which no pod lives."""
        alive = {self._owner(self.pods[name]) for name in self.live_pods()}
        for name in self.runnable():
            child = self.jobs[name]
            if child["metadata"]["uid"] not in alive:
                condition = {"type": kind, "status": "True", "lastTransitionTime": stamp(self.now)}
                condition |= {"reason": reason, "message": message}
                child["status"] = {"conditions": [condition]}
                self.changed("Job", child)

    @staticmethod
    def _owner(pod: Object) -> str:
        return next((str(owner["uid"]) for owner in pod["metadata"]["ownerReferences"]), "")

    @staticmethod
    def is_over(child: Object) -> bool:
        return bool((child.get("status") or {}).get("conditions"))

    def _uid(self) -> str:
        self.uids += 1
        return f"uid-{self.uids}"

    def changed(self, kind: str, obj: Object) -> None:
        """Its kind's watch shows the object as it is now; one without our label is deleted for it."""
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        uid = obj["metadata"]["uid"]
        if is_shown(kind, obj):
            self.hidden.discard(uid)
            self._show(kind, "MODIFIED", obj)
        elif uid not in self.hidden:
            self.hidden.add(uid)
            self._show(kind, "DELETED", obj)

    def relabel(self, kind: str, name: str, labels: dict[str, str | None]) -> None:
        """Somebody changes labels of a Job or pod; None removes one."""
        obj = (self.jobs if kind == "Job" else self.pods)[name]
        changed = {**obj["metadata"]["labels"], **labels}
        obj["metadata"]["labels"] = {key: value for key, value in changed.items() if value is not None}
        self.changed(kind, obj)

    def release_pod(self, name: str, labels: dict[str, str]) -> None:
        """Somebody replaces all labels of a pod: the Job controller lets it go, and makes another."""
        self.pods[name]["metadata"] |= {"ownerReferences": [], "labels": labels}
        self.changed("Pod", self.pods[name])
        self.start_pods()

    def _gone(self, kind: str, obj: Object) -> None:
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        if obj["metadata"]["uid"] not in self.hidden:
            self._show(kind, "DELETED", obj)

    def _show(self, kind: str, what: str, obj: Object) -> None:
        self.streams[kind].append((what, copied(obj)))
