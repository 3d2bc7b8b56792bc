"""A kubelet that runs nothing: each pod reports Running, then what its job's story says (see fake_trainer.py).

With the real Job controller it lets hundreds of attempts pass in seconds. It also watches that no two attempts of a job
could run or do run at once, and counts the Jobs ever made, by the uid of their owner and by name.
"""

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from finetune_api import constants, exit_codes
from support.server.client import (
    MERGE,
    ApiError,
    AsyncKube,
    path_of,
)
from support.server.loop_thread import Reflector

Object = dict[str, Any]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class SimulatedKubelet:
    """Use it as an async context manager."""

    def __init__(self, kube: AsyncKube, namespace: str, seconds: float = 0.2) -> None:
        self._kube, self._namespace, self._seconds = kube, namespace, seconds
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stop: dict[str, asyncio.Event] = {}
        self._running: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self.made: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.violations: list[str] = []

    async def __aenter__(self) -> "SimulatedKubelet":
        self._pods = Reflector(self._kube, "Pod", self._namespace, self._pod)
        self._jobs = Reflector(self._kube, "Job", self._namespace, self._job)
        self._runs = [asyncio.create_task(reflector.run()) for reflector in (self._pods, self._jobs)]
        await asyncio.gather(self._pods.synced.wait(), self._jobs.synced.wait())
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in [*self._runs, *self._tasks.values()]:
            task.cancel()
        await asyncio.gather(*self._runs, *self._tasks.values(), return_exceptions=True)

    def _job(self, kind: str, job: Object) -> None:
        owner_uid = (job["metadata"].get("ownerReferences") or [{}])[0].get("uid", "")
        self.made[owner_uid, job["metadata"]["name"]].add(job["metadata"]["uid"])
        able = defaultdict(list)
        for other in self._jobs.objects.values():
            over = any(
                c["type"] in ("Complete", "Failed") and c["status"] == "True"
                for c in (other.get("status") or {}).get("conditions") or []
            )
            owner = other["metadata"]["labels"].get(constants.LABEL_JOB)
            if (
                owner
                and not over
                and not other["spec"].get("suspend")
                and not other["metadata"].get("deletionTimestamp")
            ):
                able[owner].append(other["metadata"]["name"])
        self.violations += [f"{owner}: {found}" for owner, found in able.items() if len(found) > 1]

    def _pod(self, kind: str, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if kind != "DELETED" and uid not in self._tasks:
            self._stop[uid] = asyncio.Event()
            self._tasks[uid] = asyncio.create_task(self._lead(pod))
            self._tasks[uid].add_done_callback(self._ended)
        if pod["metadata"].get("deletionTimestamp") and uid in self._stop:
            self._stop[uid].set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A mistake of this kubelet must not look like a job that takes its time."""
        if not task.cancelled() and (error := task.exception()):
            self.violations.append(f"the simulated kubelet: {error!r}")

    async def _lead(self, pod: Object) -> None:
        attempt = int(pod["metadata"]["labels"][constants.LABEL_ATTEMPT])
        stop = self._stop[pod["metadata"]["uid"]]
        with contextlib.suppress(ApiError):
            spec = json.loads(pod["metadata"]["annotations"][constants.ANNOTATION_MANIFEST])["spec"]
            story = spec["dataset"]["train"].removeprefix("s3://simulated/").split("/")
            act = story[min(attempt, len(story)) - 1]
            await self._report(pod, "Running", {"running": {"startedAt": _now()}})
            with self._seen_running(pod), contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), None if act == "run" else self._seconds)
            code, message = (75, "saved a checkpoint") if stop.is_set() else self._end(act, spec["output"]["uri"])
            ended = {"exitCode": code, "reason": "Error" if code else "Completed", "message": message}
            ended |= {"startedAt": _now(), "finishedAt": _now()}
            await self._report(pod, "Failed" if code else "Succeeded", {"terminated": ended})
            await stop.wait()
            body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
            await self._kube.request("DELETE", path_of("Pod", self._namespace, pod["metadata"]["name"]), body)

    @contextlib.contextmanager
    def _seen_running(self, pod: Object) -> Iterator[None]:
        """Note that a pod runs, and whether one of another Job runs for the same FineTuneJob."""
        name, owner = pod["metadata"]["labels"][constants.LABEL_JOB], pod["metadata"]["ownerReferences"][0]["uid"]
        if others := {job for job, _ in self._running[name] if job != owner}:
            self.violations.append(f"{name}: a pod of Job {owner} runs beside one of {others}")
        self._running[name].add((owner, pod["metadata"]["uid"]))
        try:
            yield
        finally:
            self._running[name].discard((owner, pod["metadata"]["uid"]))

    @staticmethod
    def _end(act: str, uri: str) -> tuple[int, str]:
        if act == "succeed":
            adapter = {"uri": uri, "manifestDigest": "sha256:" + "a" * 64, "sizeBytes": 1}
            adapter |= {"baseModel": "m", "rank": 16}
            return 0, json.dumps({"stage": "Succeeded", "reason": "Succeeded", "adapter": adapter})
        code = {"oom": 90}.get(act) or int(act.partition("-")[2])
        plan = {"microBatchSize": 8}
        reason = exit_codes.OUTCOMES[code].reason
        return code, json.dumps({"stage": "Failed", "reason": reason, "message": act, "executionPlan": plan})

    async def _report(self, pod: Object, phase: str, state: Object) -> None:
        container = {
            "name": constants.TRAINER_CONTAINER,
            "image": "x",
            "imageID": "",
            "restartCount": 0,
            "state": state,
        }
        container |= {"ready": phase == "Running", "lastState": {}}
        status = {"phase": phase, "containerStatuses": [container]}
        body = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": status}
        path = path_of("Pod", self._namespace, pod["metadata"]["name"], "status")
        await self._kube.request("PATCH", path, body, None, MERGE)
