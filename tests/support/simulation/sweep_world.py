"""One FineTuneSweep and its FineTuneJobs in memory.

Plans are carried out as the API server would, and the test plays the trials. The operator may be killed after any of
its writes, and sees everything through its own cache.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from finetune_api import constants
from finetune_api.sweep_status import FineTuneSweepStatus
from finetune_operator.core.controllers import FINETUNE_SWEEP
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import CreateBlocked
from finetune_operator.core.types import Plan
from finetune_operator.settings import Settings
from finetune_operator.watch.cache import Cache
from support.simulation.cluster import START, stamp
from support.simulation.world import is_empty, merged

Object = dict[str, Any]
KEY = ObjectKey(constants.SWEEP_KIND, "team", "nli")
TEMPLATE: Object = {
    "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
    "dataset": {"train": "s3://data/train.jsonl", "eval": "s3://data/test.jsonl"},
    "output": {"uri": "s3://adapters/nli"},
}


class SweepWorld:
    """A sweep, its trials, and the operator."""

    def __init__(self, labels: dict[str, str] | None = None, **spec: Any) -> None:
        self.now: datetime = START
        self.version = 0
        self.cache = Cache()
        self.jobs: dict[str, Object] = {}
        self.created: list[str] = []
        """Names of the jobs that were created, once for each time."""
        self.events: list[str] = []
        self.status_writes = 0
        self.blocked: CreateBlocked | None = None
        """Set it to have creations denied."""
        self.sweep: Object | None = {
            "kind": constants.SWEEP_KIND,
            "metadata": {
                "namespace": "team",
                "name": "nli",
                "uid": "sweep-uid",
                "generation": 1,
                "labels": labels or {},
                "creationTimestamp": stamp(self.now),
            },
            "spec": {"template": copy.deepcopy(TEMPLATE), "strategy": "grid", "parallelism": 4, **spec},
        }
        self.show(self.sweep)

    def show(self, obj: Object) -> None:
        """Store an object in a new version, and have its watch show it."""
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        self.cache.put(obj["kind"], copy.deepcopy(obj))

    def plan(self) -> Plan:
        snapshot = self.cache.snapshot(KEY)
        if snapshot is None or self.sweep is None:
            return Plan()
        if not FINETUNE_SWEEP.is_whole(snapshot.owner):
            snapshot = replace(snapshot, owner=FINETUNE_SWEEP.view(self.sweep))
        observed = FINETUNE_SWEEP.observe(snapshot)
        made = FINETUNE_SWEEP.plan(observed, Settings(), self.now)
        if made.create and self.blocked:
            made = FINETUNE_SWEEP.plan(replace(observed, create_blocked=self.blocked), Settings(), self.now)
            assert not made.create
        return made

    def reconcile(self, crash_after: int | None = None) -> Plan:
        """Plan and carry out; after `crash_after` writes the operator is killed, and another one starts."""
        made = self.plan()
        for number, write in enumerate(self._writes(made)):
            if number == crash_after:
                self.restart()
                return made
            write()
        self.events += [event.reason for event in made.events]
        return made

    def settle(self, most: int = 50) -> None:
        """Reconcile until nothing changes."""
        for _ in range(most):
            if is_empty(made := self.reconcile()) and not made.resume:
                return
        raise AssertionError("the plan never comes to rest")

    def restart(self) -> None:
        self.cache = Cache()
        for obj in (*self.jobs.values(), self.sweep):
            if obj is not None:
                self.cache.put(obj["kind"], copy.deepcopy(obj))

    def _writes(self, made: Plan) -> Iterator[Callable[[], None]]:
        for obj in made.create:
            yield lambda obj=obj: self._create(obj)
        if made.status is not None:
            yield lambda: self._write_status(made.status or {})
        for target in made.suspend:
            yield lambda target=target: self._set_suspend(target.name, target.uid, True)
        for target in made.resume:
            yield lambda target=target: self._set_suspend(target.name, target.uid, False)
        for target in made.delete:
            assert target.kind == constants.SWEEP_KIND
            yield self.delete_sweep

    def _create(self, obj: Object) -> None:
        name = obj["metadata"]["name"]
        self.created.append(name)
        assert name not in self.jobs, f"{name} is created twice"
        stored = copy.deepcopy(obj)
        stored["metadata"] |= {"uid": f"uid-{name}-{self.version}", "generation": 1}
        self.jobs[name] = stored
        self.show(stored)

    def _write_status(self, patch: Object) -> None:
        assert self.sweep is not None
        self.status_writes += 1
        self.sweep["status"] = merged(self.sweep.get("status"), patch)
        FineTuneSweepStatus.model_validate(self.sweep["status"])
        self.show(self.sweep)

    def _set_suspend(self, name: str, uid: str, value: bool) -> None:
        job = self.jobs[name]
        assert job["metadata"]["uid"] == uid
        job["spec"]["suspend"] = value
        self.show(job)

    def delete_sweep(self) -> None:
        """The sweep is deleted, and the garbage collector deletes its jobs."""
        assert self.sweep is not None
        self.cache.drop(constants.SWEEP_KIND, self.sweep)
        self.sweep = None
        for name in list(self.jobs):
            self.delete_job(name)

    def delete_job(self, name: str) -> None:
        self.cache.drop(constants.KIND, self.jobs.pop(name))

    # What users and trials do

    def edit(self, **spec: Any) -> None:
        assert self.sweep is not None
        self.sweep["spec"] |= spec
        self.sweep["metadata"]["generation"] += 1
        self.show(self.sweep)

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def job(self, trial: str) -> Object:
        return self.jobs[f"nli-{trial}"]

    def trains(self, trial: str, step: int = 1, eval_loss: float | None = None) -> None:
        """A trial's pods run, and its trainer says how far it is."""
        job, progress = self.job(trial), {"step": step, "evalLoss": eval_loss}
        job["status"] = {"phase": "Training", "progress": {k: v for k, v in progress.items() if v is not None}}
        job["status"]["conditions"] = [_condition("Succeeded", "Unknown", "Training")]
        self.show(job)

    def suspends(self, trial: str) -> None:
        """A trial has saved a checkpoint, and its pods are gone."""
        job = self.job(trial)
        conditions = [_condition("Suspended", "True", "Suspended"), _condition("Succeeded", "Unknown", "Suspended")]
        job["status"] = (job.get("status") or {}) | {"phase": "Suspended", "conditions": conditions}
        self.show(job)

    def succeeds(self, trial: str, **metrics: float) -> None:
        job = self.job(trial)
        job["status"] = (job.get("status") or {}) | {
            "phase": "Succeeded",
            "metrics": metrics,
            "adapter": {"uri": job["spec"]["output"]["uri"]},
            "conditions": [_condition("Succeeded", "True", "Succeeded")],
        }
        self.show(job)

    def fails(self, trial: str, reason: str = "Diverged") -> None:
        job = self.job(trial)
        job["status"] = (job.get("status") or {}) | {
            "phase": "Failed",
            "conditions": [_condition("Succeeded", "False", reason)],
        }
        self.show(job)

    # What the status says

    @property
    def status(self) -> Object:
        return (self.sweep or {}).get("status") or {}

    @property
    def rows(self) -> dict[str, Object]:
        return {row["name"]: row for row in self.status.get("trials", [])}

    def condition(self, kind: str) -> Object:
        return next((c for c in self.status.get("conditions", []) if c["type"] == kind), {})


def _condition(kind: str, status: str, reason: str) -> Object:
    return {"type": kind, "status": status, "reason": reason, "lastTransitionTime": stamp(START)}
