"""A simulated cluster for one FineTuneJob, in memory: plans are carried out as the API server would, and the test plays
user, Job controller, Kueue and kubelet. For thousands of stories a second; the real API server tells fewer and slower.

What the operator sees goes through its own cache, so that reading API objects is part of what is tried. With `lag` each
kind's watch is a stream of its own, which shows what happened only when the test delivers it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from finetune_api import constants
from finetune_api.status import FineTuneJobStatus, TrainerReport
from finetune_operator.core.controllers import FINETUNE_JOB
from finetune_operator.core.objects.job_digest import digest_of
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import Observed
from finetune_operator.core.types import Plan
from finetune_operator.settings import Settings
from finetune_operator.watch.cache import Cache
from support.simulation.cluster import (
    KINDS,
    START,
    ImaginedCluster,
    is_shown,
    stamp,
)

__all__ = ["START", "World", "adapter_report", "is_empty", "merged", "stamp"]
from support.simulation.copies import copied

Object = dict[str, Any]
_SETTINGS = Settings()
_KEY = ObjectKey(constants.KIND, "team", "nli")


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


def is_empty(made: Plan) -> bool:
    """Whether the plan asks for nothing."""
    return not (made.create or made.status or made.suspend or made.delete or made.look_up is not None)


class World(ImaginedCluster):
    """One FineTuneJob, its children, and the operator. `skew` is how many seconds its clock is ahead of all others."""

    def __init__(
        self,
        settings: Settings | None = None,
        labels: dict[str, str] | None = None,
        lag: bool = False,
        skew: float = 0,
        **spec: Any,
    ) -> None:
        self.settings = settings or _SETTINGS
        self.lag, self.skew = lag, skew
        self.cache = Cache()
        self.report: TrainerReport | None = None
        self.silent_since: datetime | None = None
        self.asked = ""
        self.events: list[str] = []
        super().__init__(labels, **spec)

    def _show(self, kind: str, what: str, obj: Object) -> None:
        super()._show(kind, what, obj)
        if not self.lag:
            self.deliver(kind)

    # What the operator does

    def observed(self) -> Observed | None:
        """What the operator's cache holds; the trainer's report is that of the rank-0 pod it asks."""
        for doubt in self.cache.doubts(_KEY):
            found = (self.jobs if doubt.kind == "Job" else self.pods).get(doubt.name)
            if found and found["metadata"]["uid"] == doubt.uid:
                self.cache.put_unlabeled(doubt.kind, copied(found), _KEY)
            else:
                self.cache.tombstone(doubt.kind, doubt.uid)
        snapshot = self.cache.snapshot(_KEY)
        if snapshot is None:
            return None
        observed = FINETUNE_JOB.observe(snapshot)
        leader = FINETUNE_JOB.leader(observed)
        if (leader.uid if leader else "") != self.asked:
            self.asked, self.report, self.silent_since = leader.uid if leader else "", None, None
        return replace(observed, report=self.report, silent_since=self.silent_since)

    def plan(self) -> Plan:
        now = self.now + timedelta(seconds=self.skew)
        observed = self.observed()
        made = FINETUNE_JOB.plan(observed, self.settings, now) if observed else Plan()
        if made.look_up is not None:
            self._look_up(made.look_up)
            observed = self.observed()
            refreshed = replace(observed, looked_up=True) if observed else None
            made = FINETUNE_JOB.plan(refreshed, self.settings, now) if refreshed else Plan()
        return made

    def _look_up(self, names: tuple[str, ...]) -> None:
        """Read these Jobs, and lists of their pods, by our label and by Kubernetes' own."""
        for name in names:
            if name in self.jobs:
                self._look_at("Job", self.jobs[name])
        for pod in self.pods.values():
            if is_shown("Pod", pod) or any(each["name"] in names for each in pod["metadata"]["ownerReferences"]):
                self._look_at("Pod", pod)
        shown = [pod["metadata"]["uid"] for pod in self.pods.values() if is_shown("Pod", pod)]
        self.cache.keep_only("Pod", shown, self.version, only=_KEY)

    def _look_at(self, kind: str, obj: Object) -> None:
        if is_shown(kind, obj):
            self.cache.put(kind, copied(obj))
        else:
            self.cache.put_unlabeled(kind, copied(obj), _KEY)

    def reconcile(self, crash_after: int | None = None) -> Plan:
        """Plan and carry out; `crash_after` that many API calls the operator is killed and starts anew."""
        made = self.plan()
        for number, call in enumerate(self._calls(made)):
            if crash_after is not None and number >= crash_after:
                self.restart()
                break
            if not call():
                break
        return made

    def settle(self, most: int = 8) -> None:
        """Deliver and reconcile until nothing changes."""
        for _ in range(most):
            self.deliver_all()
            made = self.reconcile()
            if is_empty(made) and not any(self.streams.values()):
                return
        raise AssertionError("the plan never comes to rest")

    def restart(self) -> None:
        """A new operator with nothing in memory but what the API server holds."""
        self.cache = Cache()
        self.report, self.silent_since, self.asked = None, None, ""
        for stream in self.streams.values():
            stream.clear()
        for kind, objects in ((constants.KIND, [self.job]), ("Job", self.jobs.values()), ("Pod", self.pods.values())):
            for obj in objects:
                if obj is not None and is_shown(kind, obj):
                    self.cache.put(kind, copied(obj))

    def deliver(self, kind: str, most: int = 10**6) -> None:
        """The watch of that kind shows what it has not shown yet, at most so many events."""
        stream = self.streams[kind]
        while stream and most > 0:
            what, obj = stream.popleft()
            most -= 1
            if what == "DELETED":
                self.cache.drop(kind, obj)
            else:
                self.cache.put(kind, obj)

    def deliver_all(self) -> None:
        for kind in KINDS:
            self.deliver(kind)

    def _calls(self, made: Plan) -> Iterator[Callable[[], bool]]:
        """The API calls of a plan; one that returns False ends it, for the job has moved on."""
        for obj in made.create:
            yield lambda obj=obj: self._create(copied(obj))
        if made.status is not None:
            uid = self.jobs.get(made.create[-1]["metadata"]["name"], {})["metadata"]["uid"] if made.create else ""
            yield lambda: self._write_status(made.with_job_uid(uid).status)
        for target in made.suspend:
            yield lambda name=target.name: self._suspend(name)
        for target in made.delete:
            yield lambda target=target: self._delete(target.kind, target.name, target.uid)
        self.events += [event.reason for event in made.events]

    def _create(self, obj: Object) -> bool:
        name = obj["metadata"]["name"]
        kept = self.jobs if obj["kind"] == "Job" else self.others
        if name not in kept:  # else AlreadyExists, and ours
            obj["metadata"] |= {"uid": self._uid(), "creationTimestamp": stamp(self.now)}
            kept[name] = obj
            if obj["kind"] == "Job":
                self.changed("Job", obj)
        if not is_shown(obj["kind"], kept[name]):
            self.delete_child(name)  # refused at once
            return False
        if obj["kind"] == "Job":
            self.cache.put("Job", copied(kept[name]))
        return obj["kind"] != "Job" or digest_of(kept[name]) == digest_of(obj)

    def _write_status(self, patch: Object) -> bool:
        seen = self.cache.owner(_KEY)
        if self.job is None or seen is None or str(seen.version) != self.job["metadata"]["resourceVersion"]:
            self.deliver(constants.KIND)  # a conflict: the operator reads the job again
            return False
        self.job["status"] = merged(self.job.get("status"), json.loads(json.dumps(patch, allow_nan=False)))
        FineTuneJobStatus.model_validate(self.job["status"])
        self.changed(constants.KIND, self.job)
        self.cache.put(constants.KIND, copied(self.job))
        return True

    def _suspend(self, name: str) -> bool:
        if name in self.jobs:
            self.suspend_child(name)
            self.cache.put("Job", copied(self.jobs[name]))
        return True

    def _delete(self, kind: str, name: str, uid: str) -> bool:
        if kind == constants.KIND:
            if self.job is not None and self.job["metadata"]["uid"] == uid:
                self.delete_job()
        elif name in self.jobs and self.jobs[name]["metadata"]["uid"] == uid:
            self.delete_child(name)
        return True

    # What the status says

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

    def hears(self, stage: str = "Training", **progress: Any) -> None:
        """The trainer that is asked, if one is, reports this."""
        self.observed()
        if self.asked:
            self.report = TrainerReport.model_validate({"stage": stage, "progress": progress})
            self.silent_since = None

    def falls_silent(self) -> None:
        """The trainer that is asked has missed several polls, and the operator acts on it."""
        self.observed()
        self.silent_since = self.now
        self.settle()

    def says(self, stage: str = "Training", **progress: Any) -> None:
        """The same, and the operator acts on it."""
        self.hears(stage, **progress)
        self.settle()


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
