"""One FineTuneSweep and its FineTuneJobs in memory.

Plans are carried out as the API server would, and the test plays the trials. The operator may be killed after any of
its writes, and sees everything through its own cache.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from finetune_api import constants
from finetune_api.sweep_status import FineTuneSweepStatus
from finetune_api.trial_report import ENDED
from finetune_operator.core.controllers import FINETUNE_SWEEP
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import CreateBlocked
from finetune_operator.core.status.trial_rows import UNFINISHED
from finetune_operator.core.types import Plan
from finetune_operator.settings import Settings
from finetune_operator.watch.cache import Cache
from support.simulation.cluster import START, stamp
from support.simulation.copies import copied
from support.simulation.world import is_empty, merged

Object = dict[str, Any]
_SETTINGS = Settings()
KEY = ObjectKey(constants.SWEEP_KIND, "team", "nli")
TEMPLATE: Object = {
    "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
    "dataset": {"train": "s3://data/train.jsonl", "eval": "s3://data/test.jsonl"},
    "output": {"uri": "s3://adapters/nli"},
}
#: Of trials that share their GPUs.
SMALL_STEPS: Object = TEMPLATE | {"training": {"batchSize": 4}}


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
            "spec": {"template": copied(TEMPLATE), "strategy": "grid", "parallelism": 4, **spec},
        }
        self.show(self.sweep)

    def show(self, obj: Object) -> None:
        """Store an object in a new version, and have its watch show it."""
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        self.cache.put(obj["kind"], copied(obj))

    def plan(self) -> Plan:
        snapshot = self.cache.snapshot(KEY)
        if snapshot is None or self.sweep is None:
            return Plan()
        if not FINETUNE_SWEEP.is_whole(snapshot.owner):
            snapshot = replace(snapshot, owner=FINETUNE_SWEEP.view(self.sweep))
        observed = FINETUNE_SWEEP.observe(snapshot)
        made = FINETUNE_SWEEP.plan(observed, _SETTINGS, self.now)
        if made.create and self.blocked:
            made = FINETUNE_SWEEP.plan(replace(observed, create_blocked=self.blocked), _SETTINGS, self.now)
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
                self.cache.put(obj["kind"], copied(obj))

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
        stored = copied(obj)
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
        return self.jobs[self.job_name(trial)]

    def job_name(self, trial: str) -> str:
        """Name of the job that holds a trial: its own once it has one, else a pack."""
        packs = (name for name, job in self.jobs.items() if trial in packed(job))
        return f"nli-{trial}" if f"nli-{trial}" in self.jobs else next(packs, f"nli-{trial}")

    def is_over(self, trial: str) -> bool:
        """Whether a trial has ended, or its job has."""
        job = self.job(trial)
        status = job.get("status") or {}
        over = any(c["type"] == "Succeeded" and c["status"] != "Unknown" for c in status.get("conditions", []))
        rows = {row["name"]: row["phase"] for row in status.get("trials", [])}
        return over or rows.get(trial) in ENDED

    def live(self) -> list[str]:
        """Trials that have a job, have not ended, and whose pod may run."""
        own = [name.removeprefix("nli-") for name, job in self.jobs.items() if not packed(job)]
        named = [*own, *(trial for job in self.jobs.values() for trial in packed(job) if trial not in own)]
        return [name for name in named if not self.is_over(name) and not self.job(name)["spec"].get("suspend")]

    def training(self) -> int:
        """How many trials may train at this moment."""
        live = Counter(self.job_name(trial) for trial in self.live())
        return sum(min(count, self.jobs[name]["spec"].get("pack", {}).get("atOnce", 1)) for name, count in live.items())

    def trains(self, trial: str, step: int = 1, eval_loss: float | None = None) -> None:
        """A trial's pods run, and its trainer says how far it is."""
        job, progress = self.job(trial), {"step": step, "evalLoss": eval_loss}
        progress = {key: value for key, value in progress.items() if value is not None}
        if packed(job):
            self._tell(job, trial, phase="Running", **progress)
            progress = {"step": step}
        job["status"] = (job.get("status") or {}) | {"phase": "Training", "progress": progress}
        job["status"]["conditions"] = [_condition("Succeeded", "Unknown", "Training")]
        self.show(job)

    def suspends(self, trial: str) -> None:
        """The job of a trial has saved its checkpoints, and its pods are gone."""
        self.suspends_job(self.job(trial))

    def suspends_job(self, job: Object) -> None:
        conditions = [_condition("Suspended", "True", "Suspended"), _condition("Succeeded", "Unknown", "Suspended")]
        job["status"] = (job.get("status") or {}) | {"phase": "Suspended", "conditions": conditions}
        self.show(job)

    def succeeds(self, trial: str, **metrics: float) -> None:
        job = self.job(trial)
        if packed(job):
            self._tell(job, trial, phase="Succeeded", value=metrics.get("evalLoss"))
            self._ends_if_done(job)
            return
        job["status"] = (job.get("status") or {}) | {
            "metrics": metrics,
            "adapter": {"uri": job["spec"]["output"]["uri"]},
        }
        self.ends(job, "Succeeded")

    def fails(self, trial: str, reason: str = "Diverged", phase: str = "Failed") -> None:
        job = self.job(trial)
        if not packed(job):
            self.ends(job, reason)
            return
        self._tell(job, trial, phase=phase, reason=reason)
        self._ends_if_done(job)

    def ends(self, job: Object, reason: str) -> None:
        """A job is over; trials of a pack that have not ended never will, there."""
        phase = "Succeeded" if reason == "Succeeded" else "Failed"
        for row in (job.get("status") or {}).get("trials", []):
            if row["phase"] not in ENDED:
                row |= {"phase": "Failed", "reason": UNFINISHED}
        condition = _condition("Succeeded", "True" if reason == "Succeeded" else "False", reason)
        job["status"] = (job.get("status") or {}) | {"phase": phase, "conditions": [condition]}
        self.show(job)

    def _tell(self, job: Object, trial: str, **row: Any) -> None:
        """The trainer of a pack reports a trial."""
        status = job.setdefault("status", {})
        rows = {each["name"]: each for each in status.get("trials", [])}
        rows = {name: rows.get(name, {"name": name, "phase": "Pending"}) for name in packed(job)}
        rows[trial] |= {key: value for key, value in row.items() if value is not None}
        status |= {"phase": "Training", "trials": list(rows.values())}
        status.setdefault("conditions", [_condition("Succeeded", "Unknown", "Training")])
        self.show(job)

    def _ends_if_done(self, job: Object) -> None:
        phases = {row["phase"] for row in job["status"]["trials"]}
        if phases <= set(ENDED):
            self.ends(job, "Succeeded" if "Succeeded" in phases else job["status"]["trials"][0]["reason"])

    # What the status says

    @property
    def status(self) -> Object:
        return (self.sweep or {}).get("status") or {}

    @property
    def rows(self) -> dict[str, Object]:
        return {row["name"]: row for row in self.status.get("trials", [])}

    def condition(self, kind: str) -> Object:
        return next((c for c in self.status.get("conditions", []) if c["type"] == kind), {})


def packed(job: Object) -> list[str]:
    """Names of the trials that share a job; none of a job of one trial."""
    return [trial["name"] for trial in job["spec"].get("pack", {}).get("trials", [])]


def _condition(kind: str, status: str, reason: str) -> Object:
    return {"type": kind, "status": status, "reason": reason, "lastTransitionTime": stamp(START)}
