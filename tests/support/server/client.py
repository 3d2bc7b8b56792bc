"""A thin Kubernetes API client for tests: plain dicts in and out, so that a test sees what a user would see.

The product uses the official client; tests use this one, so that one client's mistakes cannot hide behind themselves.
"""

import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import requests
import yaml

from finetune_api import constants

T = TypeVar("T")
Object = dict[str, Any]

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"
APPLY = "application/apply-patch+yaml"

#: kind -> (API version, plural, namespaced)
KINDS: dict[str, tuple[str, str, bool]] = {
    "Namespace": ("v1", "namespaces", False),
    "Node": ("v1", "nodes", False),
    "ConfigMap": ("v1", "configmaps", True),
    "Secret": ("v1", "secrets", True),
    "Service": ("v1", "services", True),
    "ServiceAccount": ("v1", "serviceaccounts", True),
    "PersistentVolumeClaim": ("v1", "persistentvolumeclaims", True),
    "ResourceQuota": ("v1", "resourcequotas", True),
    "Pod": ("v1", "pods", True),
    "Event": ("v1", "events", True),
    "Job": ("batch/v1", "jobs", True),
    "Deployment": ("apps/v1", "deployments", True),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies", True),
    "Lease": ("coordination.k8s.io/v1", "leases", True),
    "Role": ("rbac.authorization.k8s.io/v1", "roles", True),
    "RoleBinding": ("rbac.authorization.k8s.io/v1", "rolebindings", True),
    "ClusterRole": ("rbac.authorization.k8s.io/v1", "clusterroles", False),
    "ClusterRoleBinding": ("rbac.authorization.k8s.io/v1", "clusterrolebindings", False),
    "ValidatingAdmissionPolicy": ("admissionregistration.k8s.io/v1", "validatingadmissionpolicies", False),
    "ValidatingAdmissionPolicyBinding": ("admissionregistration.k8s.io/v1", "validatingadmissionpolicybindings", False),
    "CustomResourceDefinition": ("apiextensions.k8s.io/v1", "customresourcedefinitions", False),
    constants.KIND: (constants.API_VERSION, constants.PLURAL, True),
    constants.SWEEP_KIND: (constants.API_VERSION, constants.SWEEP_PLURAL, True),
}


class ApiError(Exception):
    """The server refused: `code` is the HTTP status, `body` the Status object."""

    def __init__(self, code: int, body: Object) -> None:
        self.code = code
        self.body = body
        self.reason: str = body.get("reason", "")
        self.message: str = body.get("message", "")
        super().__init__(f"{code} {self.reason}: {self.message}")

    @property
    def causes(self) -> list[Object]:
        """Field by field: [{reason, message, field}]."""
        return list((self.body.get("details") or {}).get("causes") or [])


@dataclass(frozen=True)
class Access:
    """What a kubeconfig says: where the server is and who we are."""

    server: str
    token: str | None = None
    ca_file: Path | None = None

    def kubeconfig(self) -> Object:
        cluster: Object = {"server": self.server}
        if self.ca_file:
            cluster["certificate-authority"] = str(self.ca_file)
        context = {"cluster": "test", "user": "test", "namespace": "default"}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": self.token} if self.token else {}}],
            "contexts": [{"name": "test", "context": context}],
        }

    def write_kubeconfig(self, path: Path) -> Path:
        path.write_text(yaml.safe_dump(self.kubeconfig()))
        path.chmod(0o600)
        return path


def path_of(kind: str, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
    """The URL path of a collection or an object."""
    version, plural, namespaced = KINDS[kind]
    parts = [f"/api/{version}" if "/" not in version else f"/apis/{version}"]
    if namespaced and namespace:
        parts += ["namespaces", namespace]
    parts.append(plural)
    parts += [part for part in (name, subresource) if part]
    return "/".join(parts)


def _place(obj: Object, namespace: str | None) -> tuple[str, str | None, str | None]:
    metadata = obj.get("metadata") or {}
    return obj["kind"], metadata.get("namespace") or namespace, metadata.get("name")


def _raise_for(code: int, text: str) -> None:
    if code < 400:
        return
    try:
        body = json.loads(text)
    except ValueError:
        body = {"message": text}
    raise ApiError(code, body if isinstance(body, dict) else {"message": text})


class Kube:
    """The blocking client."""

    def __init__(self, access: Access, namespace: str | None = None) -> None:
        self.access = access
        self.namespace = namespace
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.verify = str(access.ca_file) if access.ca_file else True
        if access.token:
            self._session.headers["Authorization"] = f"Bearer {access.token}"

    def close(self) -> None:
        self._session.close()

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        params: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Any:
        """One request; raises ApiError for any answer of 400 or more."""
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": content_type, "Accept": "application/json"}
        url = self.access.server + path
        answer = self._session.request(method, url, data=data, params=params, headers=headers, timeout=60)
        _raise_for(answer.status_code, answer.text)
        is_json = answer.headers.get("Content-Type", "").startswith("application/json")
        return answer.json() if is_json else answer.text

    def create(self, obj: Object, **params: Any) -> Object:
        kind, namespace, _ = _place(obj, self.namespace)
        return self.request("POST", path_of(kind, namespace), obj, params)

    def get(self, kind: str, name: str, namespace: str | None = None) -> Object:
        return self.request("GET", path_of(kind, namespace or self.namespace, name))

    def find(self, kind: str, name: str, namespace: str | None = None) -> Object | None:
        """Like get, but None where there is none."""
        try:
            return self.get(kind, name, namespace)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def list(self, kind: str, namespace: str | None = None, **params: Any) -> list[Object]:
        """Objects of a kind; params such as labelSelector="a=b", fieldSelector="status.phase=Running"."""
        return self.request("GET", path_of(kind, namespace or self.namespace), params=params)["items"]

    def replace(self, obj: Object, subresource: str | None = None, **params: Any) -> Object:
        kind, namespace, name = _place(obj, self.namespace)
        return self.request("PUT", path_of(kind, namespace, name, subresource), obj, params)

    def patch(
        self,
        kind: str,
        name: str,
        body: Any,
        namespace: str | None = None,
        subresource: str | None = None,
        content_type: str = MERGE,
        **params: Any,
    ) -> Object:
        path = path_of(kind, namespace or self.namespace, name, subresource)
        return self.request("PATCH", path, body, params, content_type)

    def apply(self, obj: Object, manager: str = "test", force: bool = True, **params: Any) -> Object:
        """Server-side apply, as `kubectl apply --server-side`."""
        kind, namespace, name = _place(obj, self.namespace)
        query = {"fieldManager": manager, "force": str(force).lower(), "fieldValidation": "Strict", **params}
        return self.request("PATCH", path_of(kind, namespace, name), obj, query, APPLY)

    def delete(self, kind: str, name: str, namespace: str | None = None, **options: Any) -> None:
        """Delete; options such as propagationPolicy="Background", gracePeriodSeconds=0."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", **options}
        self.request("DELETE", path_of(kind, namespace or self.namespace, name), body)

    def delete_all(self, kind: str, namespace: str | None = None, **options: Any) -> None:
        body = {"kind": "DeleteOptions", "apiVersion": "v1", **options}
        self.request("DELETE", path_of(kind, namespace or self.namespace), body)

    def watch(self, kind: str, namespace: str | None = None, seconds: int = 60, **params: Any) -> Iterator[Object]:
        """Watch events {type, object} for at most `seconds`."""
        query = {"watch": "1", "timeoutSeconds": seconds, **params}
        url = self.access.server + path_of(kind, namespace or self.namespace)
        with self._session.get(url, params=query, stream=True, timeout=(10, seconds + 10)) as answer:
            if answer.status_code >= 400:
                _raise_for(answer.status_code, answer.text)
            for line in answer.iter_lines(chunk_size=1):
                if line:
                    yield json.loads(line)


class AsyncKube:
    """The asyncio client, for helpers that watch."""

    def __init__(self, access: Access) -> None:
        self.access = access
        headers = {"Authorization": f"Bearer {access.token}"} if access.token else {}
        tls = ssl.create_default_context(cafile=str(access.ca_file)) if access.ca_file else True
        connector = aiohttp.TCPConnector(ssl=tls, limit=0)
        self._session = aiohttp.ClientSession(connector=connector, headers=headers)

    async def close(self) -> None:
        await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        params: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Any:
        """One request; raises ApiError for any answer of 400 or more."""
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": content_type}
        url = self.access.server + path
        async with self._session.request(method, url, data=data, params=params, headers=headers) as answer:
            text = await answer.text()
            _raise_for(answer.status, text)
            return json.loads(text)

    async def watch(self, path: str, since: str) -> AsyncIterator[Object]:
        """Watch events after resource version `since`, until the server ends the stream."""
        params = {"watch": "1", "resourceVersion": since, "allowWatchBookmarks": "true", "timeoutSeconds": "300"}
        timeout = aiohttp.ClientTimeout(total=None, sock_read=330)
        url = self.access.server + path
        async with self._session.get(url, params=params, timeout=timeout, read_bufsize=2**22) as answer:
            if answer.status >= 400:
                _raise_for(answer.status, await answer.text())
            async for line in answer.content:
                yield json.loads(line)


def wait_until(look: Callable[[], T], what: str, seconds: float = 30, every: float = 0.1) -> T:
    """Call `look` until it returns something true, and return that; AssertionError naming `what` when it never does."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s (last look: {found!r})")
        time.sleep(every)
