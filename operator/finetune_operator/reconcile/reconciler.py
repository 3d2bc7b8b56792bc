"""Carry out the plan for one object. Every step may be the last before a crash: see core/plan.py."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

import structlog

from finetune_operator.core.controller import Controller
from finetune_operator.core.objects import raw
from finetune_operator.core.objects.job_digest import digest_of
from finetune_operator.core.objects.kinds import JOB, POD, ObjectKey
from finetune_operator.core.objects.observed import CreateBlocked, Observation
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.objects.snapshot import ReconciledView
from finetune_operator.core.types import Plan
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.errors import ApiError, CreateDenied, NamespaceTerminating
from finetune_operator.reconcile.event_recorder import EventRecorder
from finetune_operator.reconcile.work_queue import Result
from finetune_operator.settings import Settings
from finetune_operator.watch.cache import Cache
from finetune_operator.watch.progress import ProgressPoller

log = structlog.get_logger(__name__)

_CHANGED_OR_GONE = (404, 409, 410)
_INVALID = (400, 422)
#: Large objects that are read at the same time: each takes many times its bytes while it is parsed.
LARGE_READS = 2
#: Check again after this time that a namespace that was being deleted is gone.
_TERMINATING_SECONDS = 60.0
#: Look again by name at what no watch shows.
_DOUBT_SECONDS = 10.0
#: Of an owner that has more to create, what is created waits so long for its own reconcile: longer than a thousand
#: trials take, which else would be created between the writes of those before them.
CREATES_MORE_SECONDS = 8.0
#: Children created at the same time.
CREATES = 16
#: An owner is reconciled this long after one of its children changed: many of them often change together.
OWNER_SECONDS = 0.5
#: Kubernetes' own label of a Job's pods.
_JOB_NAME_LABEL = "batch.kubernetes.io/job-name"


class Conflict(Exception):
    """The object has changed since it was read: plan again after a pause, as after an error."""


class StatusDenied(Exception):
    """The API server calls the object invalid with its new status, and will do so until somebody changes the object."""


class Reconciler:
    """Brings one object after another to where the plan of its controller wants it.

    Args:
        client: The API server.
        cache: All watched objects; its registry holds the controllers.
        poller: Reads the reports of running trainers.
        recorder: Posts events.
        on_status: Called with (old, new) after each status write.
        settings: The operator's settings.
        clock: Returns the time.
        on_status_denied: Called when the API server calls an object with its new status invalid.
        on_change: Called with (key, seconds) for what a write of ours changes besides the object being reconciled: no
            watch tells of it, for echoes are left out. It is to be reconciled that much later.
    """

    def __init__(
        self,
        client: KubeClient,
        cache: Cache,
        poller: ProgressPoller,
        recorder: EventRecorder,
        on_status: Callable[[ReconciledView, ReconciledView], None],
        settings: Settings,
        clock: Callable[[], datetime],
        on_status_denied: Callable[[], None] = lambda: None,
        on_change: Callable[[ObjectKey, float], None] = lambda key, seconds: None,
    ) -> None:
        self._client, self._cache, self._poller, self._recorder = client, cache, poller, recorder
        self._on_status, self._settings, self._clock = on_status, settings, clock
        self._on_status_denied, self._on_change = on_status_denied, on_change
        self._in_doubt: set[ObjectKey] = set()
        self._large = asyncio.Semaphore(LARGE_READS)

    async def __call__(self, key: ObjectKey) -> Result:
        """Reconcile once. Raises ApiError, Conflict, OSError or TimeoutError; calling again is always right."""
        if key in self._in_doubt:
            if owner := self._cache.owner(key):
                await self._refresh(key, owner)
            self._in_doubt.discard(key)
        try:
            return await self._reconcile(key, self._cache.registry[key.kind])
        except Conflict:
            raise  # the object was read again
        except Exception:
            # A write may have succeeded although its answer was lost, and much may have followed from it: until the
            # watches show it, creating what seems to be missing would create it twice.
            self._in_doubt.add(key)
            raise

    async def _reconcile(self, key: ObjectKey, controller: Controller[Any]) -> Result:
        await self._resolve_doubts(key)
        found = await self._observe(key, controller)
        if found is None:
            return Result(_DOUBT_SECONDS if self._cache.doubts(key) else None)
        now = self._clock()
        owner, observed = found
        plan: Plan = controller.plan(observed, self._settings, now)
        if plan.look_up is not None:
            await self._look_up(key, controller, owner, plan)
            if (found := await self._observe(key, controller)) is None:
                return Result()
            owner, observed = found[0], replace(found[1], looked_up=True)
            plan = controller.plan(observed, self._settings, now)
        blocked = False
        try:
            plan = plan.with_job_uid(await self._create(key, owner, plan))
        except NamespaceTerminating:
            return Result(_TERMINATING_SECONDS)
        except CreateDenied as denial:
            log.info("child creation denied", key=str(key), reason=denial.reason, message=denial.message)
            blocked = True
            why = CreateBlocked(denial.reason, denial.message)
            plan = controller.plan(replace(observed, create_blocked=why), self._settings, now)
        try:
            if plan.status is not None:
                await self._write_status(key, controller, owner, plan.status)
        except StatusDenied as denial:
            log.error("status denied; waiting for a change of the object", key=str(key), error=str(denial))
            self._on_status_denied()
            return Result()
        was_there = await self._suspend_and_delete(key, plan)
        for event in plan.events:
            log.info("event", key=str(key), reason=event.reason, message=event.message)
            self._recorder.post(controller.kind, owner, event, now)
        if not was_there:
            return Result(after=0.0)
        again = (plan.requeue_after, _DOUBT_SECONDS if self._cache.doubts(key) else None)
        return Result(min((seconds for seconds in again if seconds is not None), default=None), blocked)

    async def _resolve_doubts(self, key: ObjectKey) -> None:
        """Ask by name for what no watch shows: it is gone only if the API server has nothing of that name and uid."""
        for doubt in self._cache.doubts(key):
            if found := await self._client.find(doubt.kind, key.namespace, doubt.name, doubt.uid):
                if not doubt.is_there:
                    log.warning("label removed; looking it up by name", key=str(key), kind=doubt.kind, name=doubt.name)
                self._cache.put_unlabeled(doubt.kind, found, key)
            else:
                self._cache.tombstone(doubt.kind, doubt.uid)

    async def _observe(self, key: ObjectKey, controller: Controller[Any]) -> tuple[ReconciledView, Observation] | None:
        """Return the object and all that is known of it; the report is that of the present leader, never an earlier."""
        snapshot = self._cache.snapshot(key)
        if snapshot is None:
            self._poller.unfollow(key)
            return None
        if not controller.is_whole(snapshot.owner):
            snapshot = replace(snapshot, owner=await self._read_whole(key, controller, snapshot.owner))
        observed: Observation = controller.observe(snapshot)
        if leader := controller.leader(observed):
            self._poller.follow(key, leader.uid, leader.ip)
        else:
            self._poller.unfollow(key)
        silent_since = self._poller.silent_since(key)
        return snapshot.owner, replace(observed, report=self._poller.report(key), silent_since=silent_since)

    async def _read_whole(self, key: ObjectKey, controller: Controller[Any], known: ReconciledView) -> ReconciledView:
        """Return all of an object of which the cache holds only a part. Raises Conflict when it is another by now."""
        async with self._large:
            found = await self._refresh(key, known)
        if found is None or raw.text(found, "metadata", "uid") != known.uid:
            raise Conflict(f"{key} has just been deleted")
        return controller.view(found)

    async def _look_up(self, key: ObjectKey, controller: Controller[Any], owner: ReconciledView, plan: Plan) -> None:
        """Read Jobs and their pods from the API server: watches may be behind, and labels replaced."""
        names, made = plan.look_up or (), [obj["metadata"]["name"] for obj in plan.create]
        shown = {view.name for view in self._cache.children(key, JOB.name)}
        for name in names:
            found = None if name in (*shown, *made) else await self._client.get(JOB.name, key.namespace, name)
            if found and raw.text(raw.controller(found), "uid") in ("", owner.uid):
                self._show(JOB.name, found, key)
        await asyncio.gather(self._refresh_pods(key, controller), self._find_pods(key, names))

    async def _find_pods(self, key: ObjectKey, jobs: tuple[str, ...]) -> None:
        """Read the pods of these Jobs by Kubernetes' own label."""
        if not jobs:
            return
        async for page in self._client.pages(POD.name, key.namespace, f"{_JOB_NAME_LABEL} in ({','.join(jobs)})"):
            for pod in page.items:
                self._show(POD.name, pod, key)

    def _show(self, kind: str, obj: Raw, key: ObjectKey) -> None:
        """Put an object into the cache, whether a watch shows it or not."""
        if self._cache.registry.is_selected(kind, obj):
            self._cache.put(kind, obj)
        else:
            self._cache.put_unlabeled(kind, obj, key)

    async def _refresh_pods(self, key: ObjectKey, controller: Controller[Any]) -> None:
        """Read the pods that carry our label."""
        label = next(child.owner_label for child in controller.children if child.kind == POD)
        uids, version, is_whole = [], 0, True
        async for page in self._client.pages(POD.name, key.namespace, f"{label}={key.name}"):
            version, is_whole = page.version, is_whole and page.whole
            for pod in page.items:
                self._cache.put(POD.name, pod)
                uids.append(raw.text(pod, "metadata", "uid"))
        if is_whole:
            self._cache.keep_only(POD.name, uids, version, only=key)

    async def _create(self, key: ObjectKey, owner: ReconciledView, plan: Plan) -> str:
        """Create the children in their order; return the uid of the Job, which comes last: its pods find the rest.

        Objects with a controller of their own need none of the others: some are created at a time, and what happens to
        one does not keep those beside it from being created.
        """
        uid, wait = "", CREATES_MORE_SECONDS if plan.creates_more else 0.0
        for some in self._batches(plan.create):
            made = await asyncio.gather(*(self._client.ensure(obj, owner.uid) for obj in some), return_exceptions=True)
            failed = [answer for answer in made if isinstance(answer, BaseException)]
            for obj, stored in zip(some, made, strict=True):
                if isinstance(stored, BaseException):
                    continue
                if obj["kind"] in self._cache.registry.watched:
                    self._record_write(key, obj["kind"], stored, wait)
                if obj["kind"] == JOB.name:
                    uid = raw.text(stored, "metadata", "uid")
                    if digest_of(stored) != digest_of(obj):
                        failed.append(Conflict(f"Job {obj['metadata']['name']} exists already and runs something else"))
            if failed:
                raise failed[0]
        return uid

    def _batches(self, objects: tuple[Raw, ...]) -> Iterator[tuple[Raw, ...]]:
        reconciled = {kind.name for kind in self._cache.registry.reconciled}
        size = CREATES if objects and all(obj["kind"] in reconciled for obj in objects) else 1
        return (objects[start : start + size] for start in range(0, len(objects), size))

    def _record_write(self, key: ObjectKey, kind: str, stored: Raw, wait: float = 0.0) -> None:
        """Put the answer to a write into the cache, and have reconciled what else it changes: itself after `wait`."""
        for other in self._cache.put_own_write(kind, stored):
            if other != key:
                self._on_change(other, wait if other.kind == kind else OWNER_SECONDS)

    async def _write_status(
        self, key: ObjectKey, controller: Controller[Any], owner: ReconciledView, status: Raw
    ) -> None:
        try:
            stored = await self._client.patch_status(key, status, owner.uid, owner.version)
        except ApiError as error:
            if error.code in _INVALID:
                raise StatusDenied(error.message) from error
            if error.code not in _CHANGED_OR_GONE:
                raise
            await self._refresh(key, owner)
            raise Conflict(str(error)) from error
        self._record_write(key, key.kind, stored)
        self._on_status(owner, controller.view(stored))

    async def _refresh(self, key: ObjectKey, owner: ReconciledView) -> Raw | None:
        """Read the object itself from the API server: its watch is behind, or missed its deletion."""
        found = await self._client.get(key.kind, key.namespace, key.name)
        uid = found["metadata"]["uid"] if found else None
        if uid != owner.uid:
            self._cache.tombstone(key.kind, owner.uid)
        if found:
            self._cache.put(key.kind, found)
        return found

    async def _suspend_and_delete(self, key: ObjectKey, plan: Plan) -> bool:
        """Suspend, resume and delete; return False when something was gone already, so that another plan is needed."""
        gone = []
        switched = (*((target, True) for target in plan.suspend), *((target, False) for target in plan.resume))
        for target, value in switched:
            if stored := await self._client.suspend(target.kind, key.namespace, target.name, target.uid, value):
                self._record_write(key, target.kind, stored)
            else:
                gone.append(target)
        for target in plan.delete:
            log.info("deleting", key=str(key), kind=target.kind, name=target.name)
            if not await self._client.delete(target.kind, key.namespace, target.name, target.uid):
                gone.append(target)
        for target in gone:
            self._cache.tombstone(target.kind, target.uid)
        return not gone
