"""A node of local processes: plays Job controller, scheduler and kubelet against any API server.

    with ProcessNode(cluster, namespace, tmp_path) as node:
        kube.create(job)            # a batch/v1 Job
        node.logs(pod_name)         # what its container printed

Every container command runs as a process of this machine, with its environment, ConfigMaps, Secrets and volumes, under
a loopback address of its own (127.x.y.z, reported as podIP; Linux). Methods called `simulate_…` report what no process
of this machine can bring about. On a cluster with the real Job controller only the scheduler and kubelet are played.
"""

import asyncio
import contextlib
import os
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import aiohttp

from support.common.processes import free_port
from support.node import logs as node_logs
from support.node.container import now
from support.node.job_controller import JobController
from support.node.pod import PodRunner
from support.node.volumes import PodFiles, references
from support.server.client import (
    MERGE,
    STRATEGIC,
    ApiError,
    AsyncKube,
    Object,
    path_of,
)
from support.server.loop_thread import (
    LoopThread,
    Reflector,
    persist,
    place_of,
)
from support.server.server import Cluster
from support.standin.rules import random_suffix

if TYPE_CHECKING:
    from support.trainer.fork_server import ForkServer


class ProcessNode:
    """A node for one namespace (or all, with None). Use it as a context manager; its processes end with it.

    `env` is added to every container's environment, `gpus` is the capacity the scheduler counts (None: no end of it).
    Trainers are forks of `trainers`, where given: set it to None for a real exec.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespace: str | None,
        folder: Path,
        env: Mapping[str, str] | None = None,
        gpus: int | None = None,
        trainers: "ForkServer | None" = None,
    ) -> None:
        self.trainers = trainers
        self.cluster = cluster
        self.namespace = namespace
        self.folder = folder / "process-node"
        self.name = f"process-node-{random_suffix()}"
        self.gpus = gpus
        self.entry_points: dict[str, list[str]] = {}
        self.simulated_pull_errors: dict[str, str] = {}
        self._simulated_unschedulable: str | None = None
        self.env = dict(env or {})
        self._runners: dict[str, PodRunner] = {}
        self._addresses: dict[tuple[str, str, str], str] = {}
        self._rendezvous_ports: dict[tuple[str, str], int] = {}

    # What tests use

    def __enter__(self) -> "ProcessNode":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread = LoopThread("process-node")
        self._thread.run(self._begin())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.run(self._end())
        self._thread.stop()

    def logs(self, pod: str, container: str | None = None) -> str:
        """What the pod has printed so far; also after it is gone."""
        folder = self._pod_folder(pod)
        files = [folder / f"{container}.log"] if container else sorted(folder.glob("*.log"))
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def all_logs(self) -> str:
        """The output of every pod that ran here."""
        return "".join(self.logs_by_pod().values())

    def logs_by_pod(self) -> dict[str, str]:
        """The output of each pod that ran here, by its name."""
        names = (path.name.partition("_")[2] for path in sorted((self.folder / "pods").glob("*")))
        return {name: self.logs(name) for name in names}

    def claim_folder(self, claim: str, namespace: str | None = None) -> Path:
        """The folder that a PersistentVolumeClaim stands for, to put files in or to look at them."""
        folder = self.folder / "claims" / (namespace or self.namespace or "default") / claim
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def pids(self, pod: str | None = None) -> list[int]:
        """Process ids of the running containers."""
        runners = [runner for runner in self._runners.values() if pod in (None, runner.name)]
        return [process.pid for runner in runners for process in runner.processes if process.exit_code is None]

    def kill(self, pod: str) -> None:
        """SIGKILL the pod's main processes: exit code 137, reason Error."""
        for process in self._runner(pod).processes:
            process.signal(9)

    def drain(self, pod: str) -> None:
        """Evict the pod through the eviction API, as `kubectl drain` does."""
        runner = self._runner(pod)
        metadata = {"name": pod, "namespace": runner.namespace}
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
        self.cluster.kube.request("POST", path_of("Pod", runner.namespace, pod, "eviction"), body)

    def simulate_oom_kill(self, pod: str) -> None:
        """SIGKILL the pod's processes and report OOMKilled, as the kernel's memory limit would have it."""
        for process in self._runner(pod).processes:
            process.reason = "OOMKilled"
            process.signal(9)

    def simulate_node_loss(self, pod: str) -> None:
        """The pod's node is gone: its processes die unseen, and the pod garbage collector fails the pod."""
        self._thread.run(self._lose(self._runner(pod)))

    def simulate_silence(self, pod: str) -> None:
        """The node of the pod is cut off: whatever becomes of the pod there, the API server hears nothing of it."""
        self._runner(pod).is_lost = True

    def simulate_unschedulable(self, message: str | None) -> None:
        """From now on no pod is scheduled, for this reason; None ends it."""
        self._simulated_unschedulable = message

    def simulate_pull_error(self, image: str, message: str = "not found") -> None:
        """Pods of this image wait in ImagePullBackOff."""
        self.simulated_pull_errors[image] = message

    # What the pods' runners use

    def base_env(self, files: PodFiles) -> dict[str, str]:
        """What an image would bring: a PATH (this Python's programs first) and little else."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        loopback = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), "lo")
        home = {"HOME": str(files.folder), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        return {"PATH": path, **home, **loopback, **self.env}

    def address_of(self, namespace: str, subdomain: str, host: str) -> str:
        """The loopback address of a host name; made up at the first question."""
        key = (namespace, subdomain, host)
        if key not in self._addresses:
            self._addresses[key] = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}.{random.randint(2, 254)}"
        return self._addresses[key]

    def address_of_pod(self, pod: Object) -> str:
        spec, metadata = pod["spec"], pod["metadata"]
        if spec.get("subdomain") and spec.get("hostname"):
            return self.address_of(metadata["namespace"], spec["subdomain"], spec["hostname"])
        return self.address_of(metadata["namespace"], "", metadata["name"])

    def rendezvous_port(self, pod: Object) -> int:
        """The port on which the pods of this one's Job find each other: torch listens on every address there is."""
        metadata = pod["metadata"]
        key = (metadata["namespace"], (metadata.get("labels") or {}).get("job-name", metadata["name"]))
        if key not in self._rendezvous_ports:
            self._rendezvous_ports[key] = free_port()
        return self._rendezvous_ports[key]

    def why_unschedulable(self, pod: Object) -> str | None:
        """The scheduler's sentence, or None when the pod may run."""
        if self._simulated_unschedulable:
            return self._simulated_unschedulable
        for volume in pod["spec"].get("volumes") or []:
            claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
            place = (pod["metadata"]["namespace"], claim)
            if claim and place not in self._claims.objects:
                return f'0/1 nodes are available: persistentvolumeclaim "{claim}" not found.'
        if self.gpus is not None and self._gpus_used() + _gpus(pod) > self.gpus:
            return "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
        return None

    async def objects_of(self, pod: Object) -> Callable[[str, str], Object | None]:
        """The ConfigMaps and Secrets that the pod refers to."""
        namespace = pod["metadata"]["namespace"]
        found: dict[tuple[str, str], Object | None] = {}
        for kind, name in references(pod):
            found[(kind, name)] = await persist(self.kube, "GET", path_of(kind, namespace, name))
        return lambda kind, name: found[(kind, name)]

    # Inside

    async def _begin(self) -> None:
        self.kube = AsyncKube(self.cluster.access)
        self._pods = Reflector(self.kube, "Pod", self.namespace, self._pod_changed)
        self._jobs = Reflector(self.kube, "Job", self.namespace, self._job_changed)
        self._claims = Reflector(self.kube, "PersistentVolumeClaim", self.namespace, lambda *_: None)
        self._controller = JobController(self.kube, self._jobs, self._pods, self.cluster.is_real)
        reflectors = [self._claims, self._jobs, self._pods]
        self._tasks = [asyncio.create_task(reflector.run()) for reflector in reflectors]
        self._log_server, port = await node_logs.serve(self.folder, self._find_log)
        await self.kube.request("POST", path_of("Node"), node_logs.node_object(self.name))
        await persist(
            self.kube, "PATCH", path_of("Node", None, self.name, "status"), node_logs.node_status(port), MERGE
        )
        for reflector in reflectors:
            await asyncio.wait_for(reflector.synced.wait(), 30)
        if not self.cluster.has_job_controller:
            self._tasks.append(asyncio.create_task(self._controller.run()))

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(
            *(runner.close() for runner in self._runners.values()), *self._tasks, return_exceptions=True
        )
        await self._log_server.cleanup()
        with contextlib.suppress(ApiError, aiohttp.ClientError):
            await self.kube.request("DELETE", path_of("Node", None, self.name))
        await self.kube.close()

    def _find_log(self, namespace: str, pod: str, container: str) -> tuple[Path, Callable[[], bool]] | None:
        mine = [r for r in self._runners.values() if (r.namespace, r.name) == (namespace, pod)]
        if not mine or not mine[-1].files.log(container).exists():
            return None
        return mine[-1].files.log(container), lambda: mine[-1].is_running

    def _runner(self, pod: str) -> PodRunner:
        found = [runner for runner in self._runners.values() if runner.name == pod]
        if not found:
            raise LookupError(f"pod {pod} is not on this node; here are {[r.name for r in self._runners.values()]}")
        return found[-1]

    def _pod_folder(self, pod: str) -> Path:
        found = list((self.folder / "pods").glob(f"*_{pod}"))
        if not found:
            raise LookupError(f"pod {pod} never ran on this node")
        return found[0]

    def _gpus_used(self) -> int:
        return sum(_gpus(runner.pod) for runner in self._runners.values() if runner.holds_resources)

    def _pod_changed(self, kind: str, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        runner = self._runners.get(uid)
        if kind == "DELETED":
            if runner:
                runner.vanish()
        elif runner:
            runner.update(pod)
        elif (pod.get("status") or {}).get("phase", "Pending") == "Pending":
            self._runners[uid] = PodRunner(self, pod)
            self._runners[uid].update(pod)
        for owner in pod["metadata"].get("ownerReferences") or []:
            if owner["kind"] == "Job":
                self._controller.take((pod["metadata"]["namespace"], owner["name"]))

    def _job_changed(self, kind: str, job: Object) -> None:
        self._controller.take(place_of(job))

    async def _lose(self, runner: PodRunner) -> None:
        runner.is_lost = True
        for process in runner.processes:
            process.signal(9)
        condition = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC"}
        condition |= {"message": "PodGC: node no longer exists", "lastTransitionTime": now()}
        body = {"status": {"phase": "Failed", "conditions": [condition]}}
        path = path_of("Pod", runner.namespace, runner.name)
        await persist(self.kube, "PATCH", f"{path}/status", body, STRATEGIC)
        await persist(self.kube, "DELETE", path, {"gracePeriodSeconds": 0})


def _gpus(pod: Object) -> int:
    limits = [container.get("resources", {}).get("limits") or {} for container in pod["spec"]["containers"]]
    return sum(int(limit.get("nvidia.com/gpu", 0)) for limit in limits)
