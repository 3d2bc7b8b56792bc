"""One pod's life on the process node, as the kubelet would lead it: prepare, run, report, stop."""

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING, Any

from support.node.container import (
    MARK,
    ContainerProcess,
    container_status,
    kill_all,
    now,
)
from support.node.events import post_event
from support.node.volumes import (
    Missing,
    PodFiles,
    environment,
    expand,
)
from support.server.client import STRATEGIC, ApiError, path_of
from support.server.loop_thread import persist

if TYPE_CHECKING:
    from support.node.node import ProcessNode

Object = dict[str, Any]

_RETRY_SECONDS = 0.5
#: torchrun's.
_PORT = "PET_MASTER_PORT"


class PodLost(Exception):
    """The pod is being deleted before it ran."""


class PodRunner:
    """Leads one pod, identified by its uid, from binding to its end."""

    def __init__(self, node: "ProcessNode", pod: Object) -> None:
        self.node = node
        self.pod = pod
        self.uid: str = pod["metadata"]["uid"]
        self.namespace: str = pod["metadata"]["namespace"]
        self.name: str = pod["metadata"]["name"]
        folder = node.folder / "pods" / f"{self.namespace}_{self.name}"
        folder.mkdir(parents=True, exist_ok=True)
        self.files = PodFiles(pod, folder, node.folder / "claims" / self.namespace)
        self.processes: list[ContainerProcess] = []
        self.is_lost = False  # with its node: nothing is reported any more
        self._deletion = asyncio.Event()
        self._grace = 30
        self._said: set[str] = set()
        self._is_bound = False
        self._task = asyncio.create_task(self._run())

    @property
    def is_done(self) -> bool:
        return self._task.done()

    @property
    def holds_resources(self) -> bool:
        """Whether the scheduler counts this pod: bound, and not over."""
        return self._is_bound and (not self.processes or self.is_running) and not self.is_done

    @property
    def is_running(self) -> bool:
        return any(process.exit_code is None for process in self.processes)

    def update(self, pod: Object) -> None:
        """Take note of a newer state of the pod."""
        self.pod = pod
        if pod["metadata"].get("deletionTimestamp"):
            self._grace = pod["metadata"].get("deletionGracePeriodSeconds") or 0
            self._deletion.set()

    def vanish(self) -> None:
        """The pod is gone from the API: nothing of it may go on."""
        self.is_lost = True
        self._deletion.set()
        self._kill_all()
        if not self.processes:
            self._task.cancel()

    def _kill_all(self) -> None:
        for process in self.processes:
            process.signal(signal.SIGKILL)  # a forked trainer's environment is not seen from outside
        kill_all(self.uid)

    async def close(self) -> None:
        self.is_lost = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._kill_all()

    async def _run(self) -> None:
        try:
            await self._bind()
            address = self.node.address_of_pod(self.pod)
            await self._report("Pending", address, [self._waiting("ContainerCreating")])
            await self._prepare(address)
            await self._start(address)
            await self._report("Running", address, [process.status() for process in self.processes])
            await self._wait_for_end()
            self._kill_all()
            succeeded = all(process.exit_code == 0 for process in self.processes)
            statuses = [process.status() for process in self.processes]
            await self._report("Succeeded" if succeeded else "Failed", address, statuses)
        except PodLost:
            await self._report_never_started()
        except FileNotFoundError as error:
            await self._report_start_error(str(error))
        finally:
            self._kill_all()
        await self._leave()

    async def _leave(self) -> None:
        """Once it is over: when the pod is deleted, tell the API server that nothing of it is left here."""
        await self._deletion.wait()
        if not self.is_lost:
            await self._request("DELETE", "", {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}})
        self.files.remove()

    async def _bind(self) -> None:
        """Play the scheduler: wait while there is a reason not to run it, then bind the pod to this node."""
        while reason := self.node.why_unschedulable(self.pod):
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": reason}
            if reason not in self._said:
                body = {"status": {"conditions": [condition | {"lastTransitionTime": now()}]}}
                await self._request("PATCH", "status", body)
                await self._event("Warning", "FailedScheduling", reason, "default-scheduler")
            await self._pause()
        self._is_bound = True
        if not self.pod["spec"].get("nodeName"):
            target = {"apiVersion": "v1", "kind": "Node", "name": self.node.name}
            binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": self.name}, "target": target}
            await self._request("POST", "binding", binding)
            assigned = f"Successfully assigned {self.namespace}/{self.name} to {self.node.name}"
            await self._event("Normal", "Scheduled", assigned, "default-scheduler")

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._deletion.wait(), _RETRY_SECONDS)
            raise PodLost

    async def _prepare(self, address: str) -> None:
        """Volumes, images and environment; each is waited for as the kubelet waits."""
        while True:
            if self._deletion.is_set():
                raise PodLost
            found = await self.node.objects_of(self.pod)
            try:
                self.files.prepare(found)
            except Missing as missing:
                volume = _volume_with(self.pod, str(missing))
                text = f'MountVolume.SetUp failed for volume "{volume}" : {missing}'
                await self._event("Warning", "FailedMount", text)
                await self._pause()
                continue
            trouble = self._trouble(found, address)
            if trouble is None:
                self._found = found
                return
            reason, message = trouble
            await self._report("Pending", address, [self._waiting(reason, message)])
            await self._event("Warning", "Failed", message)
            await self._pause()

    def _trouble(self, found: Any, address: str) -> tuple[str, str] | None:
        """Why a container cannot be created yet: its image (simulated), or what its environment refers to."""
        for container in self.pod["spec"]["containers"]:
            image = container.get("image", "")
            if image in self.node.simulated_pull_errors:
                return "ImagePullBackOff", f'Back-off pulling image "{image}": {self.node.simulated_pull_errors[image]}'
            try:
                environment(container, self.pod, found, self._rewriter(address))
            except Missing as missing:
                return "CreateContainerConfigError", str(missing)
        return None

    def _rewriter(self, address: str) -> Any:
        return self.files.rewriter(address, lambda *place: self.node.address_of(self.namespace, *place))

    async def _start(self, address: str) -> None:
        rewrite = self._rewriter(address)
        pod = self.pod | {"status": self.pod.get("status", {}) | {"podIP": address}}
        for container in self.pod["spec"]["containers"]:
            own = environment(container, pod, self._found, rewrite)
            env = {**self.node.base_env(self.files), **own, MARK: self.uid}
            if _PORT in env:
                env[_PORT] = str(self.node.rendezvous_port(self.pod))
            command = container.get("command") or self.node.entry_points.get(container.get("image", "")) or []
            words = [rewrite(expand(word, own)) for word in [*command, *(container.get("args") or [])]]
            if not words:
                raise FileNotFoundError("no command specified")
            process = await ContainerProcess.start(
                container,
                words,
                env,
                self.files.folder,
                self.files.termination_message(container),
                self.files.log(container["name"]),
                self.node.trainers,
            )
            self.processes.append(process)

    async def _wait_for_end(self) -> None:
        """Until every container ended by itself, or, when the pod is deleted, until they obeyed or were killed."""
        ends = asyncio.gather(*(process.wait() for process in self.processes))
        deletion = asyncio.create_task(self._deletion.wait())
        try:
            await asyncio.wait({ends, deletion}, return_when=asyncio.FIRST_COMPLETED)
            if not ends.done():
                for process in self.processes:
                    process.signal(signal.SIGTERM)
                await asyncio.wait({ends}, timeout=self._grace)
                if not ends.done():
                    self._kill_all()
            await ends
        finally:
            deletion.cancel()
            ends.cancel()  # else, when this is canceled, nobody would hear of its end
            await asyncio.gather(ends, return_exceptions=True)

    def _waiting(self, reason: str, message: str = "") -> Object:
        state = {"waiting": {"reason": reason} | ({"message": message} if message else {})}
        return container_status(self.pod["spec"]["containers"][0], state)

    async def _report_never_started(self) -> None:
        """The end of a pod that is deleted before it ran: the kubelet's word, or, on no node, the pod collector's."""
        if not self._is_bound:
            if not self.is_lost:
                await self._request("PATCH", "status", {"metadata": {"uid": self.uid}, "status": {"phase": "Failed"}})
            return
        text = "The container could not be located when the pod was deleted."
        ended = {"exitCode": 137, "reason": "ContainerStatusUnknown", "message": text}
        status = container_status(self.pod["spec"]["containers"][0], {"terminated": ended})
        await self._report("Failed", self.node.address_of_pod(self.pod), [status])

    async def _report_start_error(self, message: str) -> None:
        ended = {"exitCode": 127, "reason": "StartError", "message": f"failed to create containerd task: {message}"}
        container = self.pod["spec"]["containers"][0]
        status = container_status(container, {"terminated": ended | {"startedAt": now(), "finishedAt": now()}})
        await self._report("Failed", self.node.address_of_pod(self.pod), [status])

    async def _report(self, phase: str, address: str, containers: list[Object]) -> None:
        """Write the status, as the kubelet writes it."""
        if self.is_lost:
            return
        ready = "True" if phase == "Running" else "False"
        reason = {"Succeeded": {"reason": "PodCompleted"}, "Failed": {"reason": "PodFailed"}}.get(phase, {})
        conditions = [
            {"type": kind, "status": "True" if kind == "Initialized" else ready, "lastTransitionTime": now(), **reason}
            for kind in ("Initialized", "ContainersReady", "Ready")
        ]
        status = {
            "phase": phase,
            "startTime": self.pod.get("status", {}).get("startTime") or now(),
            "hostIP": "127.0.0.1",
            "hostIPs": [{"ip": "127.0.0.1"}],
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": conditions,
            "containerStatuses": containers,
        }
        patched = await self._request("PATCH", "status", {"metadata": {"uid": self.uid}, "status": status})
        if patched:
            self.pod = patched

    async def _event(self, kind: str, reason: str, message: str, component: str = "kubelet") -> None:
        """Post an event once."""
        if message in self._said:
            return
        self._said.add(message)
        with contextlib.suppress(ApiError):
            await post_event(self.node.kube, self.pod, kind, reason, message, component)

    async def _request(self, method: str, subresource: str, body: Object) -> Object | None:
        """A request about this pod, tried again through outages; None when the pod is gone or changed hands."""
        path = path_of("Pod", self.namespace, self.name, subresource)
        content_type = STRATEGIC if method == "PATCH" else "application/json"
        return await persist(self.node.kube, method, path, body, content_type)


def _volume_with(pod: Object, message: str) -> str | None:
    """The volume whose source is the one `message` names."""
    for volume in pod["spec"].get("volumes") or []:
        source = volume.get("configMap") or volume.get("secret") or {}
        name = source.get("name") or source.get("secretName")
        if name and f'"{name}"' in message:
            return str(volume["name"])
    return None
