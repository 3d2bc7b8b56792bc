"""What the chaos tests play: stories of jobs with the users and queues in them, and what must have become of each.

Users, Kueue and the kubelet (fake_kubelet.py) are simulated and talk to the API server directly; the operator
alone goes through the proxy that does the harm.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from finetune_api import constants
from support.node.fake_kubelet import SimulatedKubelet
from support.operator.fixtures import manifest
from support.server.client import (
    MERGE,
    ApiError,
    AsyncKube,
    Object,
    path_of,
)
from support.server.loop_thread import Reflector

QUEUE = {constants.LABEL_KUEUE_QUEUE: "gpus"}
HALF_A_DAY = 12 * 3600
OVER = ("Succeeded", "Failed")


@dataclass(frozen=True)
class Story:
    """A job's spec, what its user does to it, and its end: a phase, or Gone."""

    act: str = "succeed"
    attempts: tuple[str, ...] = ("Succeeded",)
    end: str = "Succeeded"
    spec: Object = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    user: "Callable[[Chaos, str], Coroutine[Any, Any, None]] | None" = None


async def suspends_and_resumes(chaos: "Chaos", name: str) -> None:
    await chaos.wait_for(name, "Scheduled", "PodsRunning")
    await chaos.change(name, {"suspend": True})
    await chaos.wait_for(name, "Suspended", "Suspended")
    await chaos.change(name, {"suspend": False})


async def deletes(chaos: "Chaos", name: str) -> None:
    await chaos.wait_for(name, "Scheduled", "PodsRunning")
    await chaos.delete(name)


async def deletes_and_creates_again(chaos: "Chaos", name: str) -> None:
    await deletes(chaos, name)
    await chaos.post(name, STORIES["succeed"])


STORIES = {
    "succeed": Story(),
    "data": Story("fail-65", ("DatasetInvalid",), "Failed"),
    "store": Story("fail-69/succeed", ("Unavailable", "Succeeded")),
    "memory": Story("oom/succeed", ("GpuOutOfMemory", "Succeeded")),
    "spot": Story("fail-75/fail-75/succeed", ("Preempted", "Preempted", "Succeeded")),
    "unlucky": Story("fail-69/oom/fail-69/succeed", ("Unavailable", "GpuOutOfMemory", "Unavailable", "Succeeded")),
    "diverges": Story("oom/fail-91", ("GpuOutOfMemory", "Diverged"), "Failed"),
    "late": Story("run", ("DeadlineExceeded",), "Failed", {"activeDeadlineSeconds": 2}),
    "in-time": Story("fail-69/succeed", ("Unavailable", "Succeeded"), spec={"activeDeadlineSeconds": HALF_A_DAY}),
    "cleaned-up": Story("succeed", (), "Gone", {"ttlSecondsAfterFinished": 1}),
    "kept": Story("succeed", spec={"ttlSecondsAfterFinished": HALF_A_DAY}),
    "paused": Story("run/succeed", ("Suspended", "Succeeded"), user=suspends_and_resumes),
    "deleted": Story("run", (), "Gone", user=deletes),
    "again": Story("run", user=deletes_and_creates_again),
    "queued": Story("fail-69/succeed", ("Unavailable", "Succeeded"), labels=QUEUE),
    "nodes": Story("fail-69/succeed", ("Unavailable", "Succeeded"), spec={"resources": {"nodes": 2, "gpusPerNode": 0}}),
}


class Chaos:
    """The jobs of one test, and what became of them."""

    def __init__(self, kube: AsyncKube, namespace: str, kubelet: SimulatedKubelet) -> None:
        self.kube, self.namespace, self.kubelet = kube, namespace, kubelet
        self.stories: dict[str, Story] = {}
        self._users: dict[str, asyncio.Task[None]] = {}

    async def create(self, *stories: str) -> None:
        """A job for each of these stories, by default for all."""
        for story in stories or STORIES:
            name = f"{story}-{len(self.stories)}"
            self.stories[name] = STORIES[story]
            await self.post(name, STORIES[story])
            if user := STORIES[story].user:
                self._users[name] = asyncio.create_task(user(self, name))

    async def post(self, name: str, story: Story) -> None:
        recovery = {"backoffSeconds": 0, "maxAttempts": 10}
        body = manifest(name, story.act, story.labels, recovery=recovery, **story.spec)
        while True:
            try:
                await self.kube.request("POST", path_of(constants.KIND, self.namespace), body)
                return
            except ApiError as error:
                if error.code != 409:  # the one before it is not quite gone
                    raise
                await asyncio.sleep(0.2)

    async def change(self, name: str, spec: Object) -> None:
        await self.kube.request("PATCH", path_of(constants.KIND, self.namespace, name), {"spec": spec}, None, MERGE)

    async def delete(self, name: str) -> None:
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        await self.kube.request("DELETE", path_of(constants.KIND, self.namespace, name), body)

    async def wait_for(self, name: str, kind: str, reason: str) -> None:
        """Until a condition is True for that reason."""
        while True:
            status = (await self.statuses()).get(name, {})
            for condition in status.get("conditions", []):
                if (condition["type"], condition["status"], condition["reason"]) == (kind, "True", reason):
                    return
            await asyncio.sleep(0.2)

    async def statuses(self) -> dict[str, dict[str, Any]]:
        found = await self.kube.request("GET", path_of(constants.KIND, self.namespace))
        return {job["metadata"]["name"]: job.get("status") or {} for job in found["items"]}

    async def unfinished(self) -> list[str]:
        """Jobs that are not where their story ends, and users that still wait for something."""
        statuses = await self.statuses()
        left = [name for name, task in self._users.items() if not task.done()]
        for name, story in self.stories.items():
            is_over = name not in statuses if story.end == "Gone" else statuses.get(name, {}).get("phase") in OVER
            left += [] if is_over else [name]
        return sorted(set(left))

    async def explain(self, left: list[str]) -> list[str]:
        """What is last said of these jobs, for those that take too long."""
        statuses = await self.statuses()
        return [f"{name}: {_said(statuses[name]) if name in statuses else 'is gone'}" for name in left]

    async def assert_nothing_lost_or_doubled(self) -> None:
        for task in self._users.values():
            await task
        statuses = await self.statuses()
        staying = {name: story for name, story in self.stories.items() if story.end != "Gone"}
        assert {name: statuses.get(name, {}).get("phase") for name in staying} == {
            name: story.end for name, story in staying.items()
        }
        told = {
            name: [a.get("reason") for a in statuses[name]["attempts"]] for name, s in staying.items() if s.attempts
        }
        assert told == {name: list(story.attempts) for name, story in staying.items() if story.attempts}
        assert not self.kubelet.violations, f"two attempts of a job could write at once: {self.kubelet.violations}"
        twice = {name: uids for name, uids in self.kubelet.made.items() if len(uids) > 1}
        assert not twice, f"made twice, by owner and name: {twice}; there are {sorted(statuses)}"
        assert await self._left_running() == [], "something of a job that is over still runs"

    async def _left_running(self) -> list[str]:
        """Jobs that are not over, of jobs that are."""
        found = (await self.kube.request("GET", path_of("Job", self.namespace)))["items"]
        over = {"Complete", "Failed"}
        return [
            job["metadata"]["name"]
            for job in found
            if not {c["type"] for c in (job.get("status") or {}).get("conditions", [])} & over
            and not job["metadata"].get("deletionTimestamp")
        ]

    async def stop(self) -> None:
        for task in self._users.values():
            task.cancel()
        await asyncio.gather(*self._users.values(), return_exceptions=True)


def _said(status: dict[str, Any]) -> str:
    attempts = [attempt.get("reason") for attempt in status.get("attempts", [])]
    told = [
        f"{c['type']}={c['status']} {c['reason']} since {c['lastTransitionTime']}" for c in status.get("conditions", [])
    ]
    return f"{status.get('phase')}, attempts {attempts}, {told}"


class Kueue:
    """Admits every Job of a queue after a moment (simulated). Use it as an async context manager."""

    def __init__(self, kube: AsyncKube, namespace: str, seconds: float = 0.3) -> None:
        self._kube, self._namespace, self._seconds = kube, namespace, seconds
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> "Kueue":
        self._jobs = Reflector(self._kube, "Job", self._namespace, self._job)
        self._run = asyncio.create_task(self._jobs.run())
        await self._jobs.synced.wait()
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in [self._run, *self._tasks.values()]:
            task.cancel()
        await asyncio.gather(self._run, *self._tasks.values(), return_exceptions=True)

    def _job(self, kind: str, job: Object) -> None:
        uid, labels = job["metadata"]["uid"], job["metadata"].get("labels") or {}
        if kind != "DELETED" and constants.LABEL_KUEUE_QUEUE in labels and uid not in self._tasks:
            self._tasks[uid] = asyncio.create_task(self._admit(job))

    async def _admit(self, job: Object) -> None:
        assert job["spec"].get("suspend") is True, "a queued Job must be made suspended"
        await asyncio.sleep(self._seconds)
        body = {"metadata": {"uid": job["metadata"]["uid"]}, "spec": {"suspend": False}}
        with contextlib.suppress(ApiError, aiohttp.ClientError):
            path = path_of("Job", self._namespace, job["metadata"]["name"])
            await self._kube.request("PATCH", path, body, None, MERGE)
