"""The only module that talks to the API server: plain dicts in and out, through kubernetes.aio's configuration."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import aiohttp
from pydantic_core import from_json, to_json
from yarl import URL

from finetune_api import constants
from finetune_operator.core.objects import raw
from finetune_operator.core.objects.raw import Raw
from finetune_operator.kube.urls import path

MERGE_PATCH = "application/merge-patch+json"
#: Objects a page: small, because a page is tens of times larger in memory than on the wire.
PAGE = 100
CHUNK_BYTES = 1 << 20
#: A watch without a sign of life for this long is dead: servers send bookmarks each minute.
SILENCE_SECONDS = 70
_JSON = "application/json"
#: Answers of which we need nothing more are asked for without spec, data and status.
METADATA_ONLY = f"{_JSON};as=PartialObjectMetadata;g=meta.k8s.io;v=v1,{_JSON}"
_OWNED = {"fieldManager": constants.FIELD_MANAGER}


class ApiError(Exception):
    """The API server refused. `code` is the HTTP status, `reason` Kubernetes' word for it."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        self.code, self.reason, self.message = code, reason, message
        super().__init__(f"{code} {reason}: {message}")


class Refused(Exception):
    """A child cannot be made for now: its name is taken, a quota is full, an admission webhook says no."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(f"{reason}: {message}")


class Terminating(Exception):
    """The namespace is being deleted, and with it everything of the job: there is nothing left to do or to say."""


@dataclass(frozen=True)
class Page:
    """Part of a list. `version` is the list's resource version; `last` says that nothing follows."""

    items: list[Raw]
    version: int
    last: bool


class Cluster:
    """The calls the operator makes. Every one raises ApiError for an answer of 400 or more, OSError or TimeoutError."""

    def __init__(self, session: aiohttp.ClientSession, server: str, timeout_seconds: float) -> None:
        self._session, self._server = session, server.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)

    async def request(
        self,
        method: str,
        where: str,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content_type: str = _JSON,
        accept: str = _JSON,
    ) -> Raw:
        """One request; the answer as plain data."""
        data = await self.send(method, where, body, query, content_type, accept)
        found = from_json(data)
        return found if isinstance(found, dict) else {}

    async def send(
        self,
        method: str,
        where: str,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content_type: str = _JSON,
        accept: str = METADATA_ONLY,
    ) -> bytes:
        """One request whose answer is not looked into, for reading it takes longer than sending."""
        headers = {"Content-Type": content_type, "Accept": accept}
        data = None if body is None else encoded(body)
        url = self._url(where, query)
        with _as_os_errors():
            async with self._session.request(method, url, data=data, headers=headers, timeout=self._timeout) as answer:
                found = await answer.read()
        if answer.status >= 400:
            raise _error(answer.status, found)
        return found

    def _url(self, where: str, query: Mapping[str, str] | None) -> URL:
        """Paths hold Kubernetes names and need no quoting, which would take longer than all else here."""
        return URL(self._server + where + (f"?{urlencode(query)}" if query else ""), encoded=True)

    async def serves_finetunejobs(self) -> bool:
        """Whether the CRD is installed. Discovery needs no permission of its own."""
        try:
            found = await self.request("GET", f"/apis/{constants.API_VERSION}")
        except ApiError as error:
            if error.code == 404:
                return False
            raise
        return any(entry.get("name") == constants.PLURAL for entry in raw.entries(found, "resources"))

    async def get(self, kind: str, namespace: str, name: str) -> Raw | None:
        """The object, or None where there is none."""
        try:
            return await self.request("GET", path(kind, namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def ensure(self, obj: Raw, owner_uid: str) -> Raw:
        """Create a child, or find it made already. Raises Refused when it cannot be made for now, or Terminating.

        Not through server-side apply: see docs/adr/0001. Of the object made only the metadata is asked back.
        """
        kind, namespace, name = obj["kind"], obj["metadata"]["namespace"], obj["metadata"]["name"]
        try:
            made = await self.request("POST", path(kind, namespace), obj, _OWNED, accept=METADATA_ONLY)
        except ApiError as error:
            if error.code == 409 and error.reason == "AlreadyExists":
                return await self._own(kind, namespace, name, owner_uid)
            if refusal := _refusal(kind, name, error):
                raise refusal from error
            raise
        return {**obj, "metadata": {**obj["metadata"], **raw.mapping(made, "metadata")}}

    async def _own(self, kind: str, namespace: str, name: str, owner_uid: str) -> Raw:
        """The object of that name if `owner_uid` controls it, for then an earlier run of ours made it."""
        found = await self.get(kind, namespace, name)
        if found is None:
            raise Refused("Stopping", f"{kind} {name} has just been deleted")
        owner = raw.controller(found)
        if raw.text(owner, "uid") != owner_uid:
            if raw.text(owner, "kind") == constants.KIND:  # an earlier one of this name: no other makes these names
                raise Refused("Stopping", f"waiting for the earlier job's {kind} {name} to be gone")
            who = f"{raw.text(owner, 'kind')} {raw.text(owner, 'name')}" if owner else "no controller"
            raise Refused("NameConflict", f"{kind} {name} exists already and belongs to {who}: delete or rename it")
        if raw.at(found, "metadata", "deletionTimestamp"):
            raise Refused("Stopping", f"waiting for the earlier {kind} {name} to be gone")
        return found

    async def patch_status(self, namespace: str, name: str, status: Raw, uid: str, version: int) -> Raw:
        """Merge-patch the status of that very FineTuneJob in that very version; 409 when it has moved on."""
        body = {"metadata": {"uid": uid, "resourceVersion": str(version)}, "status": status}
        where = path(constants.KIND, namespace, name, "status")
        return await self.request("PATCH", where, body, _OWNED, MERGE_PATCH)

    async def suspend(self, namespace: str, name: str, uid: str) -> Raw | None:
        """Suspend a Job: Kubernetes stops its pods with their grace period. None when that Job is gone."""
        body = {"metadata": {"uid": uid}, "spec": {"suspend": True}}
        try:
            return await self.request("PATCH", path("Job", namespace, name), body, _OWNED, MERGE_PATCH)
        except ApiError as error:
            if not await self._is_gone(error, uid, "Job", namespace, name):
                raise
            return None

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> bool:
        """Delete that very object, its dependents in the background. False when it was gone or replaced already."""
        body = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        try:
            await self.send("DELETE", path(kind, namespace, name), body)
        except ApiError as error:
            if not await self._is_gone(error, uid, kind, namespace, name):
                raise
            return False
        return True

    async def _is_gone(self, error: ApiError, uid: str, kind: str, namespace: str, name: str) -> bool:
        """Whether an error means that the object is gone. A 409 may also mean that somebody else changed it."""
        if error.code == 409:
            found = await self.get(kind, namespace, name)
            return raw.text(found, "metadata", "uid") != uid
        return error.code in (404, 410)

    async def pages(self, kind: str, namespace: str | None, label_selector: str = "") -> AsyncIterator[Page]:
        """All objects of a kind, page by page, from one consistent snapshot."""
        query = {"limit": str(PAGE)} | ({"labelSelector": label_selector} if label_selector else {})
        while True:
            found = await self.request("GET", path(kind, namespace), query=query)
            token = raw.text(found, "metadata", "continue")
            yield Page(raw.entries(found, "items"), raw.version(found), not token)
            if not token:
                return
            query["continue"] = token

    async def watch(self, where: str, query: Mapping[str, str], seconds: int) -> AsyncIterator[Raw]:
        """Events of a watch that starts with the present state, until the server ends it after `seconds`."""
        common = {"watch": "true", "allowWatchBookmarks": "true", "resourceVersion": "0"}
        url = self._url(where, {**common, "timeoutSeconds": str(seconds), **query})
        timeout = aiohttp.ClientTimeout(total=seconds + 30, sock_read=SILENCE_SECONDS)
        with _as_os_errors():
            async with self._session.get(url, headers={"Accept": _JSON}, timeout=timeout) as answer:
                if answer.status >= 400:
                    raise _error(answer.status, await answer.read())
                rest = b""
                async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield _event(line)


def encoded(body: Any) -> bytes:
    """JSON for the API server, which knows no NaN and no infinity: such a number, a trainer's, becomes null."""
    return to_json(body, inf_nan_mode="null")


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """aiohttp's errors of a broken connection are no OSErrors, though to us they are."""
    try:
        yield
    except aiohttp.ClientError as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def _error(code: int, data: bytes) -> ApiError:
    try:
        status = from_json(data)
    except ValueError:
        return ApiError(code, "", data[:200].decode(errors="replace"))
    return ApiError(code, raw.text(status, "reason"), raw.text(status, "message"))


def _event(line: bytes) -> Raw:
    """One line of a watch. Raises ApiError for an error that comes as an event, such as 410 Gone."""
    event: Raw = from_json(line)
    if event.get("type") == "ERROR":
        status = raw.mapping(event, "object")
        raise ApiError(raw.integer(status, "code"), raw.text(status, "reason"), raw.text(status, "message"))
    return event


def _refusal(kind: str, name: str, error: ApiError) -> Refused | Terminating | None:
    """What a refusal means to the job; None for a passing trouble of the server."""
    if error.code == 403:
        if "exceeded quota" in error.message:
            return Refused("QuotaExceeded", error.message)
        if "being terminated" in error.message:
            return Terminating(error.message)
        return Refused("Forbidden", f"{kind} {name}: {error.message}")
    if error.code in (400, 422):
        return Refused("Rejected", f"{kind} {name}: {error.message}")
    return None
