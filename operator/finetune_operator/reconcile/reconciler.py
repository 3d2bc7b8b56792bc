"""Carry out what the plan for one job says. Every step may be the last before a crash: see core/plan.py."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

import structlog

from finetune_api import constants
from finetune_operator.core.objects import raw
from finetune_operator.core.objects.observed import JobObject, Observed, Obstacle
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.plan import plan
from finetune_operator.core.types import Plan
from finetune_operator.kube.client import (
    ApiError,
    Cluster,
    Refused,
    Terminating,
)
from finetune_operator.observability.job_metrics import Fleet
from finetune_operator.reconcile.event_recorder import Recorder
from finetune_operator.reconcile.work_queue import Result
from finetune_operator.settings import Settings
from finetune_operator.watch.cache import Cache
from finetune_operator.watch.progress import Poller

log = structlog.get_logger(__name__)

_MOVED_ON = (404, 409, 410)
#: When to look again at a job whose namespace was being deleted, should it still be there.
_TERMINATING_SECONDS = 60.0


class Conflict(Exception):
    """The job has changed since it was looked at: what it needs is thought over after a pause, as after an error."""


class Reconciler:
    """Brings one job after another to where its plan wants it."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        poller: Poller,
        recorder: Recorder,
        fleet: Fleet,
        settings: Settings,
        clock: Callable[[], datetime],
    ) -> None:
        self._cluster, self._cache, self._poller, self._recorder = cluster, cache, poller, recorder
        self._fleet, self._settings, self._clock = fleet, settings, clock
        self._in_doubt: set[str] = set()

    async def __call__(self, key: str) -> Result:
        """One reconcile. Raises ApiError, Conflict, OSError or TimeoutError; calling again is always right."""
        if key in self._in_doubt:
            if observed := self._cache.observed(key, None):
                await self._refresh(observed.job)
            self._in_doubt.discard(key)
        try:
            return await self._reconcile(key)
        except Conflict:
            raise  # it has been looked at anew
        except Exception:
            # A write may have been done although its answer was lost, and much may have followed from it: until the
            # watches tell, making what seems to be missing would make it twice.
            self._in_doubt.add(key)
            raise

    async def _reconcile(self, key: str) -> Result:
        observed = self._observe(key)
        if observed is None:
            return Result()
        now = self._clock()
        made = plan(observed, self._settings, now)
        if made.look:
            await self._look(observed.job)
            if (observed := self._observe(key)) is None:
                return Result()
            observed = replace(observed, looked=True)
            made = plan(observed, self._settings, now)
        blocked = False
        try:
            await self._create(observed.job, made)
        except Terminating:
            return Result(_TERMINATING_SECONDS)
        except Refused as refusal:
            log.info("a child cannot be made", key=key, reason=refusal.reason, message=refusal.message)
            blocked = True
            made = plan(replace(observed, obstacle=Obstacle(refusal.reason, refusal.message)), self._settings, now)
        if made.status is not None:
            await self._write_status(observed.job, made.status)
        was_there = await self._take_away(observed.job, made)
        for event in made.events:
            log.info("event", key=key, reason=event.reason, message=event.message)
            self._recorder.post(observed.job, event, now)
        return Result(made.requeue_after, blocked) if was_there else Result(after=0.0)

    def _observe(self, key: str) -> Observed | None:
        """Everything known of the job; its report is that of the pod that runs now, never of one before it."""
        observed = self._cache.observed(key, None)
        if observed is None:
            self._poller.leave(key)
            return None
        self._follow(observed)
        return replace(observed, report=self._poller.report(key))

    async def _look(self, job: JobObject) -> None:
        """Read the job's pods: their watch may be behind that of Jobs."""
        uids, version = [], 0
        async for page in self._cluster.pages("Pod", job.namespace, f"{constants.LABEL_JOB}={job.name}"):
            version = page.version
            for pod in page.items:
                self._cache.put("Pod", pod)
                uids.append(raw.text(pod, "metadata", "uid"))
        self._cache.keep_only("Pod", uids, version, only=job.key)

    def _follow(self, observed: Observed) -> None:
        """Read the progress of the rank-0 pod that runs, if one does."""
        leaders = [pod for pod in observed.pods if pod.index == 0 and pod.running and pod.ip and not pod.exit]
        if leaders and not observed.job.deleting:
            leader = max(leaders, key=lambda pod: (pod.attempt, pod.created_at))
            self._poller.follow(observed.job.key, leader.uid, leader.ip)
        else:
            self._poller.leave(observed.job.key)

    async def _create(self, job: JobObject, made: Plan) -> None:
        """Make the children in their order; the Job comes last, so that its pods find the rest."""
        for obj in made.create:
            stored = await self._cluster.ensure(obj, job.uid)
            if obj["kind"] == "Job":
                self._cache.wrote("Job", stored)

    async def _write_status(self, job: JobObject, status: Raw) -> None:
        try:
            stored = await self._cluster.patch_status(job.namespace, job.name, status, job.uid, job.version)
        except ApiError as error:
            if error.code not in _MOVED_ON:
                raise
            await self._refresh(job)
            raise Conflict(str(error)) from error
        self._cache.wrote(constants.KIND, stored)
        self._fleet.changed(job, JobObject.of(stored))

    async def _refresh(self, job: JobObject) -> None:
        """Look at the job itself: its watch is behind, or has missed its end."""
        found = await self._cluster.get(constants.KIND, job.namespace, job.name)
        uid = found["metadata"]["uid"] if found else None
        if uid != job.uid:
            self._cache.forget(constants.KIND, job.key, job.uid)
        if found:
            self._cache.put(constants.KIND, found)

    async def _take_away(self, job: JobObject, made: Plan) -> bool:
        """Suspend and delete; False when something was gone already, for then another plan is needed."""
        gone = []
        for target in made.suspend:
            if stored := await self._cluster.suspend(job.namespace, target.name, target.uid):
                self._cache.wrote("Job", stored)
            else:
                gone.append(target)
        for target in made.delete:
            log.info("deleting", key=job.key, kind=target.kind, name=target.name)
            if not await self._cluster.delete(target.kind, job.namespace, target.name, target.uid):
                gone.append(target)
        for target in gone:
            self._cache.forget(target.kind, job.key, target.uid)
        return not gone
