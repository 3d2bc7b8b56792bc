"""The Job controller's shell: takes Jobs whose state changed, asks node_jobs.decide, and does what it says."""

import asyncio
from datetime import UTC, datetime

import aiohttp

from support.node.events import post_event
from support.node.job_rules import TRACKING_FINALIZER, decide
from support.server.client import (
    MERGE,
    STRATEGIC,
    ApiError,
    AsyncKube,
    Object,
    path_of,
)
from support.server.loop_thread import (
    Place,
    Reflector,
    persist,
    place_of,
)
from support.standin.rules import random_suffix


class JobController:
    """Played where no kube-controller-manager runs. `take` names a Job to look at; `run` never ends."""

    def __init__(self, kube: AsyncKube, jobs: Reflector, pods: Reflector, is_real: bool) -> None:
        self._kube = kube
        self._jobs = jobs
        self._pods = pods
        self._is_real = is_real
        self._counted: set[str] = set()
        self._due: asyncio.Queue[Place] = asyncio.Queue()

    def take(self, place: Place) -> None:
        self._due.put_nowait(place)

    async def run(self) -> None:
        while True:
            place = await self._due.get()
            try:
                await self._control(place)
            except (ApiError, aiohttp.ClientError, TimeoutError):
                asyncio.get_running_loop().call_later(0.5, self._due.put_nowait, place)

    async def _control(self, place: tuple[str, str]) -> None:
        """One step of the Job controller for the Job at `place`."""
        namespace, name = place
        job = self._jobs.objects.get(place)
        if job is None or job["metadata"].get("deletionTimestamp"):
            await self._release_pods_of(namespace, name, job)
            return
        pods = [pod for pod in self._pods.objects.values() if _is_owned(pod, job["metadata"]["uid"])]
        step = decide(job, pods, self._counted, datetime.now(UTC), random_suffix)
        if step.look_again_seconds:
            asyncio.get_running_loop().call_later(step.look_again_seconds, self._due.put_nowait, place)
        for pod in step.create:
            await self._create_pod(job, pod)
        for pod_name in step.drop:
            await self._release(namespace, pod_name)
        for pod_name in [*step.delete, *step.drop]:
            await persist(self._kube, "DELETE", path_of("Pod", namespace, pod_name), {})
        self._counted |= set(step.counted)
        for pod_name in step.release:  # before the status says Complete, as the real controller does
            await self._release(namespace, pod_name)
        if step.status is not None:
            body = {"metadata": {"uid": job["metadata"]["uid"]}, "status": _with_removals(step.status, job)}
            stored = await persist(self._kube, "PATCH", path_of("Job", namespace, name, "status"), body, MERGE)
            if stored:
                self._jobs.objects[place] = stored

    async def _create_pod(self, job: Object, pod: Object) -> None:
        """Create a pod of the Job; a refusal (quota, admission) becomes the Job's event, and it is tried again."""
        namespace = job["metadata"]["namespace"]
        try:
            created = await self._kube.request("POST", path_of("Pod", namespace), pod)
        except ApiError as error:
            if error.code == 403:
                message = f"Error creating: {error.message}"
                await post_event(self._kube, job, "Warning", "FailedCreate", message, "job-controller")
            raise
        self._pods.objects.setdefault(place_of(created), created)

    async def _release_pods_of(self, namespace: str, name: str, job: Object | None) -> None:
        """Pods of a deleted Job need no counting; without the finalizer they can go."""
        for pod in list(self._pods.objects.values()):
            owners = pod["metadata"].get("ownerReferences") or []
            mine = any(o["kind"] == "Job" and o["name"] == name for o in owners)
            if (
                mine
                and pod["metadata"]["namespace"] == namespace
                and TRACKING_FINALIZER in (pod["metadata"].get("finalizers") or [])
            ):
                await self._release(namespace, pod["metadata"]["name"])

    async def _release(self, namespace: str, pod: str) -> None:
        body = {"metadata": {"$deleteFromPrimitiveList/finalizers": [TRACKING_FINALIZER]}}
        if not self._is_real:
            body = {"metadata": {"finalizers": None}}
        await persist(self._kube, "PATCH", path_of("Pod", namespace, pod), body, STRATEGIC)


def _is_owned(pod: Object, uid: str) -> bool:
    return any(
        owner["uid"] == uid and owner.get("controller") for owner in pod["metadata"].get("ownerReferences") or []
    )


def _with_removals(status: Object, job: Object) -> Object:
    """For a merge patch: what the status no longer has is null."""
    gone = set(job.get("status") or {}) - set(status)
    return status | dict.fromkeys(gone)
