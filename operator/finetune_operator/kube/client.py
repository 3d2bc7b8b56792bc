"""What the operator asks of the API server, and what it makes of the answers."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass

import aiohttp

from finetune_api import answers, constants
from finetune_operator.core.objects import as_built, kinds, raw
from finetune_operator.core.objects.kinds import Kind, ObjectKey
from finetune_operator.core.objects.raw import Raw
from finetune_operator.kube.errors import (
    ApiError,
    CreateDenied,
    UnreadableAnswer,
    create_error,
    unreadable,
)
from finetune_operator.kube.requests import JSON, METADATA_ONLY, Requests
from finetune_operator.kube.urls import path, resource_of

MERGE_PATCH = "application/merge-patch+json"
#: Objects per page: few, because a page takes tens of times more memory than bytes on the wire.
PAGE = 100
#: A page with more bytes than this is read in smaller ones.
PAGE_BYTES = 4 << 20
#: Of every write: who we are, and that a field which the server does not know is an error, not dropped in silence.
OWNED = {"fieldManager": constants.FIELD_MANAGER, "fieldValidation": "Strict"}
_KINDS = (
    kinds.FINETUNE_JOB,
    kinds.FINETUNE_SWEEP,
    kinds.JOB,
    kinds.POD,
    kinds.SERVICE,
    kinds.NETWORK_POLICY,
    kinds.EVENT,
)


@dataclass(frozen=True)
class Page:
    """One page of a list. `version` is the resource version of the list; no page follows the `last` one.

    A page that is not `whole` leaves objects out that cannot be read: they exist all the same.
    """

    items: list[Raw]
    version: int
    last: bool
    whole: bool = True


class KubeClient(Requests):
    """The requests that the operator makes; each raises what Requests raises.

    Args:
        session: The session to send with.
        server: URL of the API server.
        timeout_seconds: Timeout of a request, but not of a watch.
        more: The kinds to reach besides FineTuneJobs, Jobs, pods, Services, NetworkPolicies and events.
        on_unreadable: Called with (resource, count) for objects that can be read in parts only, or not at all.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        server: str,
        timeout_seconds: float,
        more: Iterable[Kind] = (),
        on_unreadable: Callable[[str, int], None] = lambda resource, count: None,
    ) -> None:
        super().__init__(session, server, timeout_seconds, on_unreadable)
        self._kinds = {kind.name: kind for kind in (*_KINDS, *more)}

    def _path(self, kind: str, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        return path(self._kinds[kind], namespace, name, subresource)

    async def is_served(self, kind: Kind) -> bool:
        """Return whether the CRD of a kind is installed. Discovery needs no permission of its own."""
        try:
            found = await self.request("GET", f"/apis/{kind.api_version}")
        except ApiError as error:
            if error.code == 404:
                return False
            raise
        return any(entry.get("name") == kind.plural for entry in raw.entries(found, "resources"))

    async def get(self, kind: str, namespace: str, name: str) -> Raw | None:
        """Return the object; None where there is none."""
        where = self._path(kind, namespace, name)
        try:
            found = await self.request("GET", where)
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        if not raw.text(found, "metadata", "uid"):
            raise UnreadableAnswer(f"the answer of {where} is no object: it has no uid")
        return found

    async def find(self, kind: str, namespace: str, name: str, uid: str) -> Raw | None:
        """Return the object of that name and uid, whatever its labels; None where there is none.

        Through a list, for which the right to list is enough.
        """
        async for page in self.pages(kind, namespace, field_selector=f"metadata.name={name}"):
            for obj in page.items:
                if raw.text(obj, "metadata", "uid") == uid and raw.text(obj, "metadata", "name") == name:
                    return obj
        return None

    async def ensure(self, obj: Raw, owner_uid: str) -> Raw:
        """Create a child, or return the one that an earlier reconcile created.

        Not through server-side apply: see docs/adr/0001. The answer holds only the metadata.

        Args:
            obj: The child with its owner reference.
            owner_uid: Uid of the object that must control an existing child of that name.

        Raises:
            CreateDenied: It cannot be created for now.
            NamespaceTerminating: Its namespace is being deleted.
        """
        kind, namespace, name = obj["kind"], obj["metadata"]["namespace"], obj["metadata"]["name"]
        is_job = kind == kinds.JOB.name
        accept = JSON if is_job else METADATA_ONLY
        try:
            made = await self.request("POST", self._path(kind, namespace), obj, OWNED, accept=accept)
        except ApiError as error:
            if error.code == 409 and error.reason == "AlreadyExists":
                found = await self._existing(obj, owner_uid)
                return await self._refuse_relabeled(obj, found) if is_job else _refuse_changed(obj, found)
            if refusal := create_error(kind, name, error):
                raise refusal from error
            raise
        if is_job:
            await self._refuse_relabeled(obj, made)
        return {**obj, "metadata": {**obj["metadata"], **raw.mapping(made, "metadata")}}

    async def _refuse_relabeled(self, obj: Raw, made: Raw) -> Raw:
        """Return the Job; delete it if a webhook has changed its labels or owner, by which alone it is found again.

        Its name stays taken until its pods are gone.

        Raises:
            CreateDenied: It was changed.
        """
        kind, metadata = obj["kind"], obj["metadata"]
        lost = _lost_labels(metadata["labels"], raw.labels(made))
        if raw.at(made, "spec", "template") is not None:
            lost += _lost_labels(_template_labels(obj), _template_labels(made))
        if raw.text(raw.controller(made), "uid") != raw.text(raw.controller(obj), "uid"):
            lost.append("its owner reference")
        uid = raw.text(made, "metadata", "uid")
        if not lost or not uid:
            return made
        await self.delete(kind, metadata["namespace"], metadata["name"], uid, "Foreground")
        raise CreateDenied(
            "LabelsReplaced",
            f"{kind} {metadata['name']} was created without {', '.join(dict.fromkeys(lost))}, and deleted at once: an"
            f" admission webhook changes labels or owners; exclude objects with the label"
            f" {constants.LABEL_MANAGED_BY}={constants.FIELD_MANAGER} from it",
        )

    async def _existing(self, obj: Raw, owner_uid: str) -> Raw:
        """Return the object of that name if `owner_uid` controls it: an earlier reconcile created it."""
        kind, namespace, name = obj["kind"], obj["metadata"]["namespace"], obj["metadata"]["name"]
        found = await self.get(kind, namespace, name)
        if found is None:
            raise CreateDenied("Stopping", f"{kind} {name} has just been deleted")
        owner = raw.controller(found)
        if raw.text(owner, "uid") != owner_uid:
            if raw.text(owner, "kind") == raw.text(raw.controller(obj), "kind"):  # an earlier owner of the same name
                raise CreateDenied("Stopping", f"waiting for the earlier job's {kind} {name} to be gone")
            who = f"{raw.text(owner, 'kind')} {raw.text(owner, 'name')}" if owner else "no controller"
            raise CreateDenied(
                "NameConflict", f"{kind} {name} exists already and belongs to {who}: delete or rename it"
            )
        if raw.at(found, "metadata", "deletionTimestamp"):
            raise CreateDenied("Stopping", f"waiting for the earlier {kind} {name} to be gone")
        return found

    async def patch_status(self, key: ObjectKey, status: Raw, uid: str, version: int) -> Raw:
        """Merge-patch the status of an object with that uid and version; a 409 says that it has changed since."""
        body = {"metadata": {"uid": uid, "resourceVersion": str(version)}, "status": status}
        where = self._path(key.kind, key.namespace, key.name, "status")
        return await self.request("PATCH", where, body, OWNED, MERGE_PATCH)

    async def suspend(self, kind: str, namespace: str, name: str, uid: str, value: bool = True) -> Raw | None:
        """Set spec.suspend of a Job or FineTuneJob: its pods stop in their grace period. None when it is gone."""
        body = {"metadata": {"uid": uid}, "spec": {"suspend": value}}
        try:
            return await self.request("PATCH", self._path(kind, namespace, name), body, OWNED, MERGE_PATCH)
        except ApiError as error:
            if not await self._is_gone(error, uid, kind, namespace, name):
                raise
            return None

    async def delete(self, kind: str, namespace: str, name: str, uid: str, dependents: str = "Background") -> bool:
        """Delete the object with that uid, and its dependents (propagationPolicy). Return False when it was gone."""
        body = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": dependents,
            "preconditions": {"uid": uid},
        }
        try:
            await self.request("DELETE", self._path(kind, namespace, name), body, accept=METADATA_ONLY)
        except ApiError as error:
            if not await self._is_gone(error, uid, kind, namespace, name):
                raise
            return False
        return True

    async def _is_gone(self, error: ApiError, uid: str, kind: str, namespace: str, name: str) -> bool:
        """Return whether an error means that the object is gone. A 409 may also mean that somebody else changed it."""
        if error.code == 409:
            found = await self.get(kind, namespace, name)
            return raw.text(found, "metadata", "uid") != uid
        return error.code in (404, 410)

    async def pages(
        self, kind: str, namespace: str | None, label_selector: str = "", field_selector: str = ""
    ) -> AsyncIterator[Page]:
        """Yield all objects of a kind, page by page, from one consistent snapshot."""
        where, token, limit = self._path(kind, namespace), "", PAGE
        selectors = {"labelSelector": label_selector, "fieldSelector": field_selector}
        query = {name: selector for name, selector in selectors.items() if selector}
        while True:
            more = {"continue": token} if token else {}
            asked, most = {"limit": str(limit), **query, **more}, PAGE_BYTES if limit > 1 else None
            data = await self.send("GET", where, query=asked, accept=JSON, most=most)
            if most is not None and len(data) > most:
                limit = max(1, limit // 4)
                continue
            try:
                found = answers.read_list(data)
            except ValueError as error:
                raise unreadable(where, data, error) from None
            if not (version := raw.version(found.head)):
                raise UnreadableAnswer(f"the answer of {where} is no list: it has no resourceVersion")
            if count := len(found.cut) + found.lost:
                self.on_unreadable(resource_of(where), count)
            token = raw.text(found.head, "metadata", "continue")
            yield Page(found.items, version, not token, not found.lost)
            if not token:
                return


def _refuse_changed(obj: Raw, found: Raw) -> Raw:
    """Return `found`, of another kind than Job, if it is as we built it: anybody may have made it in our name.

    A FineTuneJob is taken as it is: the API server has filled in its spec, the rules hold for it whoever made it, and
    what was drawn for a trial is what the first creation says.

    Raises:
        CreateDenied: It is not.
    """
    if obj["kind"] != constants.KIND and (changed := as_built.changed_fields(obj, found)):
        name = f"{obj['kind']} {obj['metadata']['name']}"
        raise CreateDenied(
            "NameConflict",
            f"{name} exists already, and its {', '.join(changed)} is not what this operator sets: somebody else made or"
            " changed it. Delete it, and the operator makes it anew",
        )
    return found


def _template_labels(obj: Raw) -> dict[str, str]:
    return raw.labels(raw.at(obj, "spec", "template"))


def _lost_labels(asked: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return what is missing of the labels of our own group."""
    ours = {name: value for name, value in asked.items() if name.startswith(f"{constants.GROUP}/")}
    return [f"label {name}={value}" for name, value in ours.items() if found.get(name) != value]
