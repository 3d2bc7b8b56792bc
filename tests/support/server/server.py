"""A Kubernetes API to test against: the real binaries where they are, else the stand-in.

`kind` is one of
- "controllers": etcd, kube-apiserver, kube-controller-manager (Job, garbage collection, namespaces, quota: all real);
- "apiserver": etcd and kube-apiserver, with the tests' own garbage collector;
- "standin": the server of standin/.
Binaries come from $KUBEBUILDER_ASSETS, else /usr/local/kubebuilder/bin, as for controller-runtime's envtest.
FINETUNE_TEST_CLUSTER picks a kind; without it the first that can run is taken.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from support.common.processes import Process, free_port
from support.server.client import (
    Access,
    ApiError,
    Kube,
    wait_until,
)
from support.server.garbage_collector import GarbageCollector

ROOT = Path(__file__).parents[3]
CRD_FILE = ROOT / "crds" / "finetunejobs.yaml"
CRD_FILES = (CRD_FILE, ROOT / "crds" / "finetunesweeps.yaml")
CONTROLLERS, APISERVER, STANDIN = KINDS = ("controllers", "apiserver", "standin")
_NEEDED = {CONTROLLERS: ("etcd", "kube-apiserver", "kube-controller-manager"), APISERVER: ("etcd", "kube-apiserver")}
_CHOICE = "FINETUNE_TEST_CLUSTER"
AUDIT_LOG = "audit.log"
#: Every request of every ServiceAccount, once it is answered (a watch: also when it starts), and nobody else's.
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "userGroups": ["system:serviceaccounts"]}, {"level": "None"}],
}


def assets() -> Path:
    """Where the real binaries would be."""
    return Path(os.environ.get("KUBEBUILDER_ASSETS") or "/usr/local/kubebuilder/bin")


def available() -> list[str]:
    """The kinds that can run here, the most real first."""
    real = [kind for kind, needed in _NEEDED.items() if all(os.access(assets() / name, os.X_OK) for name in needed)]
    return [*real, STANDIN]


def chosen() -> str:
    """The kind that tests run against."""
    kind = os.environ.get(_CHOICE) or available()[0]
    if kind not in available():
        raise ValueError(
            f"{_CHOICE}={kind}: can run here: {', '.join(available())} (binaries looked for in {assets()})"
        )
    return kind


def describe(kind: str) -> str:
    """One line for the test report."""
    if kind == STANDIN:
        return "stand-in API server (no RBAC, admission or CEL; `make envtest` fetches the real one)"
    version = subprocess.run([assets() / "kube-apiserver", "--version"], capture_output=True, text=True, check=True)
    extra = " with kube-controller-manager" if kind == CONTROLLERS else ""
    return f"real kube-apiserver {version.stdout.split()[-1]}{extra} from {assets()}"


class Cluster:
    """A running API server. Use `start`, and `namespace` for each test."""

    def __init__(self, kind: str, access: Access, folder: Path) -> None:
        self.kind = kind
        self.access = access
        self.folder = folder
        self.kubeconfig = access.write_kubeconfig(folder / "kubeconfig")
        self.kube = Kube(access)

    @property
    def is_real(self) -> bool:
        return self.kind != STANDIN

    @property
    def has_job_controller(self) -> bool:
        return self.kind == CONTROLLERS

    @contextmanager
    def namespace(self, prefix: str = "test") -> Iterator[str]:
        """A fresh namespace, deleted with all in it at the end (without waiting)."""
        name = f"{prefix}-{uuid.uuid4().hex[:8]}"
        self.kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        try:
            yield name
        finally:
            self._release_pods(name)
            self.kube.delete("Namespace", name)

    def _release_pods(self, namespace: str) -> None:
        """What no kubelet is left to do: let go of the pods."""
        for pod in self.kube.list("Pod", namespace):
            name = pod["metadata"]["name"]
            try:
                self.kube.patch("Pod", name, {"metadata": {"finalizers": None}}, namespace)
                self.kube.delete("Pod", name, namespace, gracePeriodSeconds=0)
            except ApiError as error:
                if error.code != 404:
                    raise

    def access_of_service_account(self, namespace: str, name: str, seconds: int = 3600) -> Access:
        """Act as a ServiceAccount, with a token from the TokenRequest API (real servers only)."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": seconds},
        }
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        token = self.kube.request("POST", path, body)["status"]["token"]
        return Access(self.access.server, token, self.access.ca_file)

    def audited(self, user: str) -> list[dict[str, Any]]:
        """What the API server says this ServiceAccount ("system:serviceaccount:<namespace>:<name>") asked of it.

        Entries of its audit log (audit.k8s.io/v1 Event, level Metadata); real servers only.
        """
        lines = (self.folder / AUDIT_LOG).read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["user"]["username"] == user]

    def apply_crds(self) -> None:
        """Apply the definitions in crds/ and wait until their kinds are served."""
        definitions = [yaml.safe_load(file.read_text()) for file in CRD_FILES]
        for definition in definitions:
            self.kube.apply(definition)

        def served() -> bool:
            try:
                for definition in definitions:
                    self.kube.request("GET", f"/apis/finetune.dev/v1alpha1/{definition['spec']['names']['plural']}")
            except ApiError:
                return False
            return True

        wait_until(served, "the kinds of crds/ are served")


@contextmanager
def start(kind: str | None = None, history: int = 100_000) -> Iterator[Cluster]:
    """A cluster of `kind` (default: `chosen()`) with the CRD applied; stopped, with its data gone, at the end.

    `history` is how many changes of a kind the stand-in remembers for watches.
    """
    kind = kind or chosen()
    folder = Path(tempfile.mkdtemp(prefix=f"finetune-{kind}-"))
    try:
        with _standin(folder, history) if kind == STANDIN else _real(kind, folder) as access:
            cluster = Cluster(kind, access, folder)
            cluster.apply_crds()
            with _controllers(cluster) if kind == CONTROLLERS else nullcontext():
                yield cluster
            cluster.kube.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _standin(folder: Path, history: int) -> Iterator[Access]:
    port = free_port()
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "support.standin.server", "--port", str(port), "--history", str(history)]
    process = Process(command, folder / "standin.log", env)
    try:
        process.wait_for_url(f"http://127.0.0.1:{port}/readyz")
        yield Access(f"http://127.0.0.1:{port}")
    finally:
        process.stop()


@contextmanager
def _real(kind: str, folder: Path) -> Iterator[Access]:
    processes: list[Process] = []
    collector = None
    try:
        etcd = _start_etcd(folder, processes)
        access = _start_apiserver(folder, etcd, processes)
        if kind == APISERVER:
            collector = GarbageCollector(access)
        yield access
    finally:
        if collector:
            collector.stop()
        for process in reversed(processes):
            process.kill()  # its data goes away with it


def _start_etcd(folder: Path, processes: list[Process]) -> str:
    client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    command = [
        assets() / "etcd",
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]
    processes.append(Process(command, folder / "etcd.log"))
    processes[-1].wait_for_url(f"{client}/readyz")
    return client


def _start_apiserver(folder: Path, etcd: str, processes: list[Process]) -> Access:
    token = secrets.token_hex(16)
    (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
    key = folder / "service-account.key"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    (folder / "audit.yaml").write_text(yaml.safe_dump(_AUDIT_POLICY))
    port = free_port()
    command = [
        assets() / "kube-apiserver",
        f"--etcd-servers={etcd}",
        f"--cert-dir={folder / 'certs'}",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        f"--token-auth-file={folder / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        "--disable-admission-plugins=ServiceAccount",  # nothing makes the default account in every namespace
        "--allow-privileged",
        f"--audit-policy-file={folder / 'audit.yaml'}",
        f"--audit-log-path={folder / AUDIT_LOG}",
        "--audit-log-mode=blocking",
    ]
    processes.append(Process(command, folder / "apiserver.log"))
    access = Access(f"https://127.0.0.1:{port}", token, folder / "certs" / "apiserver.crt")
    processes[-1].wait_for_url(f"{access.server}/readyz", token=token, ca_file=access.ca_file)
    processes[-1].wait_for_url(f"{access.server}/api/v1/namespaces/default", token=token, ca_file=access.ca_file)
    return access


@contextmanager
def _controllers(cluster: Cluster) -> Iterator[None]:
    """The controller manager, started once FineTuneJobs are served: it looks for new kinds only twice a minute."""
    folder, access = cluster.folder, cluster.access
    port = free_port()
    command = [
        assets() / "kube-controller-manager",
        f"--kubeconfig={access.write_kubeconfig(folder / 'controllers.kubeconfig')}",
        "--controllers=job-controller,garbage-collector-controller,namespace-controller,resourcequota-controller,"
        "ttl-after-finished-controller",
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--cert-dir={folder / 'controller-certs'}",
        "--authorization-always-allow-paths=/healthz",
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        "--concurrent-gc-syncs=5",
    ]
    process = Process(command, folder / "controllers.log")
    try:
        certificate = folder / "controller-certs" / "kube-controller-manager.crt"
        process.wait_for_url(f"https://127.0.0.1:{port}/healthz", ca_file=certificate)
        yield
    finally:
        process.kill()
