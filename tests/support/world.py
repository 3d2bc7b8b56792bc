"""A simulated cluster for one FineTuneJob, in memory: plans are carried out as the API server would, and the test plays
user, Job controller and kubelet. For thousands of stories a second; the real API server tells fewer and slower.

What the operator sees goes through its own cache, so that reading API objects is part of what is tried.
"""

import copy
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api import names
from finetune_api.status import FineTuneJobStatus, TrainerReport
from finetune_operator.cache import Cache
from finetune_operator.core.observed import Observed
from finetune_operator.core.plan import plan
from finetune_operator.core.steps import Plan
from finetune_operator.settings import Settings

Object = dict[str, Any]
START = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)


def stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def merged(target: Any, patch: Any) -> Any:
    """RFC 7396, as the API server does it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


class Crash(Exception):
    """The operator dies here."""


class World:
    """One FineTuneJob and its children. Times move only when the test says so."""

    def __init__(self, settings: Settings | None = None, labels: dict[str, str] | None = None, **spec: Any) -> None:
        self.settings = settings or Settings()
        self.now = START
        self.version = 1
        self.uids = 0
        self.cache = Cache()
        self.report: TrainerReport | None = None
        self.jobs: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.others: dict[str, Object] = {}
        self.events: list[str] = []
        minimal = {
            "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
            "dataset": {"train": "s3://data/train.jsonl"},
            "output": {"uri": "s3://adapters/nli"},
        }
        metadata = {"name": "nli", "namespace": "team", "uid": self._uid(), "generation": 1, "labels": labels or {}}
        metadata["creationTimestamp"] = stamp(self.now)
        self.job: Object | None = {"metadata": metadata, "spec": minimal | spec}
        self._changed(names.KIND, self.job)

    # What the operator does

    def observed(self) -> Observed | None:
        return self.cache.observed("team/nli", self.report)

    def plan(self) -> Plan:
        observed = self.observed()
        return plan(observed, self.settings, self.now) if observed else Plan()

    def reconcile(self, crash_after: int | None = None) -> Plan:
        """Plan and carry out; `crash_after` that many API calls the operator is killed and starts anew."""
        made = self.plan()
        for number, call in enumerate(self._calls(made)):
            if crash_after is not None and number >= crash_after:
                self.restart()
                break
            call()
        return made

    def settle(self, most: int = 20) -> None:
        """Reconcile until nothing changes."""
        for _ in range(most):
            made = self.reconcile()
            if not (made.create or made.status or made.suspend or made.delete):
                return
        raise AssertionError("the plan never comes to rest")

    def restart(self) -> None:
        """A new operator with nothing in memory but what the API server holds."""
        self.cache = Cache()
        self.report = None
        for kind, objects in ((names.KIND, [self.job]), ("Job", self.jobs.values()), ("Pod", self.pods.values())):
            for obj in objects:
                if obj is not None:
                    self.cache.put(kind, copy.deepcopy(obj))

    def _calls(self, made: Plan) -> Iterator[Callable[[], None]]:
        for obj in made.create:
            yield lambda obj=obj: self._create(copy.deepcopy(obj))
        if made.status is not None:
            yield lambda: self._write_status(made.status)
        for target in made.suspend:
            yield lambda name=target.name: self._suspend(name)
        for target in made.delete:
            yield lambda target=target: self._delete(target.kind, target.name, target.uid)
        self.events += [event.reason for event in made.events]

    def _create(self, obj: Object) -> None:
        name = obj["metadata"]["name"]
        kept = self.jobs if obj["kind"] == "Job" else self.others
        if name in kept:
            return  # AlreadyExists, and ours
        obj["metadata"] |= {"uid": self._uid(), "creationTimestamp": stamp(self.now)}
        kept[name] = obj
        if obj["kind"] == "Job":
            self._changed("Job", obj)

    def _write_status(self, patch: Object) -> None:
        assert self.job is not None
        self.job["status"] = merged(self.job.get("status"), patch)
        FineTuneJobStatus.model_validate(self.job["status"])
        self._changed(names.KIND, self.job)

    def _suspend(self, name: str) -> None:
        self.jobs[name]["spec"]["suspend"] = True
        self._changed("Job", self.jobs[name])
        self.stop_pods(name)

    def _delete(self, kind: str, name: str, uid: str) -> None:
        if kind == names.KIND:
            assert self.job is not None and self.job["metadata"]["uid"] == uid
            self.delete_job()
        elif name in self.jobs and self.jobs[name]["metadata"]["uid"] == uid:
            self.delete_child(name)

    # What users and controllers do

    @property
    def status(self) -> Object:
        return (self.job or {}).get("status") or {}

    def condition(self, kind: str) -> Object:
        return next((c for c in self.status.get("conditions", []) if c["type"] == kind), {})

    @property
    def outcome(self) -> str:
        """True, False or Unknown."""
        return self.condition("Succeeded").get("status", "Unknown")

    @property
    def reasons(self) -> list[str | None]:
        """How each attempt ended."""
        return [attempt.get("reason") for attempt in self.status.get("attempts", [])]

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def change_spec(self, **spec: Any) -> None:
        assert self.job is not None
        self.job["spec"] |= spec
        self.job["metadata"]["generation"] += 1
        self._changed(names.KIND, self.job)

    def delete_job(self) -> None:
        assert self.job is not None
        self.cache.drop(names.KIND, self.job)
        self.job = None
        for name in list(self.jobs):
            self.delete_child(name)

    def delete_child(self, name: str) -> None:
        """A Job is deleted; its pods are told to stop."""
        child = self.jobs.pop(name)
        self.cache.drop("Job", child)
        self.stop_pods(name)

    def runnable(self) -> list[str]:
        """Jobs whose pods Kubernetes would start."""
        return [n for n, child in self.jobs.items() if not child["spec"].get("suspend") and not self.is_over(child)]

    def live_pods(self) -> list[str]:
        return [name for name, pod in self.pods.items() if pod["status"]["phase"] in ("Pending", "Running")]

    def start_pods(self) -> None:
        """The Job controller makes the missing pods, and they start."""
        for name in self.runnable():
            child = self.jobs[name]
            nodes = child["spec"]["completions"]
            for index in range(nodes):
                pod_name = f"{name}-{index}-{child['metadata']['uid']}"
                if pod_name not in self.pods:
                    self._make_pod(pod_name, child, index)

    def _make_pod(self, pod_name: str, child: Object, index: int) -> None:
        metadata = {
            "name": pod_name,
            "namespace": "team",
            "uid": self._uid(),
            "labels": dict(child["spec"]["template"]["metadata"]["labels"]),
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
            "creationTimestamp": stamp(self.now),
            "ownerReferences": [{"kind": "Job", "uid": child["metadata"]["uid"], "controller": True}],
        }
        state = {"running": {"startedAt": stamp(self.now)}}
        container = {"name": "trainer", "state": state}
        status = {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [container]}
        self.pods[pod_name] = {"metadata": metadata, "status": status}
        self._changed("Pod", self.pods[pod_name])

    def stop_pods(self, job_name: str) -> None:
        """SIGTERM: deletionTimestamp now, the end when `exit_pods` or `remove_pods` says so."""
        for name in self.live_pods():
            if name.startswith(f"{job_name}-"):
                self.pods[name]["metadata"]["deletionTimestamp"] = stamp(self.now)
                self._changed("Pod", self.pods[name])

    def exit_pods(self, code: int, report: Object | None = None, disrupted: str = "", reason: str = "Error") -> None:
        """Every live pod ends with `code`; the Job controller draws its conclusion."""
        message = json.dumps(report) if report else ""
        for name in self.live_pods():
            pod = self.pods[name]
            pod["status"]["phase"] = "Failed" if code else "Succeeded"
            ended = {"exitCode": code, "reason": reason, "message": message, "finishedAt": stamp(self.now)}
            pod["status"]["containerStatuses"][0]["state"] = {"terminated": ended}
            if disrupted:
                condition = {"type": "DisruptionTarget", "status": "True", "message": disrupted}
                pod["status"]["conditions"] = [condition]
            self._changed("Pod", pod)
        self._conclude("Failed" if code else "Complete")
        self.remove_pods()

    def remove_pods(self) -> None:
        """Pods that were deleted, and are over, go."""
        for name, pod in list(self.pods.items()):
            over = pod["status"]["phase"] in ("Failed", "Succeeded")
            if pod["metadata"].get("deletionTimestamp") and over:
                self.cache.drop("Pod", self.pods.pop(name))

    def lose_pods(self) -> None:
        """Every pod is gone without a word; the Job fails."""
        for name in list(self.pods):
            self.cache.drop("Pod", self.pods.pop(name))
        self._conclude("Failed")

    def _conclude(self, kind: str) -> None:
        alive = {owner for name in self.live_pods() for owner in [self._owner(name)]}
        for child in self.jobs.values():
            uid = child["metadata"]["uid"]
            had = child["metadata"]["name"] in self.runnable()
            if had and uid not in alive:
                condition = {"type": kind, "status": "True", "lastTransitionTime": stamp(self.now)}
                child["status"] = {"conditions": [condition]}
                self._changed("Job", child)

    def _owner(self, pod: str) -> str:
        return str(self.pods[pod]["metadata"]["ownerReferences"][0]["uid"])

    @staticmethod
    def is_over(child: Object) -> bool:
        return bool((child.get("status") or {}).get("conditions"))

    def _uid(self) -> str:
        self.uids += 1
        return f"uid-{self.uids}"

    def _changed(self, kind: str, obj: Object) -> None:
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        self.cache.put(kind, copy.deepcopy(obj))


def adapter_report(step: int = 100, **more: Any) -> Object:
    """The termination message of a trainer that published."""
    adapter = {
        "uri": "s3://adapters/nli",
        "manifestDigest": "sha256:" + "a" * 64,
        "sizeBytes": 1,
        "baseModel": "m",
        "rank": 16,
    }
    progress = {"step": step, "totalSteps": 100, "loss": 0.4}
    return {"stage": "Succeeded", "reason": "Succeeded", "adapter": adapter, "progress": progress} | more
