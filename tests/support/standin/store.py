"""The stand-in's state: objects, one revision counter, a bounded history for watches, and ownership."""

import asyncio
import copy
import uuid
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from support.standin.types import (
    BUILTIN,
    CRD,
    Resource,
    from_crd,
)

Object = dict[str, Any]
Key = tuple[str, str]  # group, plural
Place = tuple[str, str]  # namespace ("" when cluster-wide), name


_FOREGROUND = "foregroundDeletion"


class Refusal(Exception):
    """An answer of 400 or more."""

    def __init__(self, code: int, reason: str, message: str, details: Object | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        self.status |= {"message": message, "reason": reason, "details": details or {}, "code": code}


@dataclass(frozen=True)
class Change:
    """One step of the history: `old` is None for ADDED, `new` is the last state for DELETED."""

    revision: int
    type: str
    old: Object | None
    new: Object


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def place_of(obj: Object) -> Place:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def not_found(resource: Resource, name: str) -> Refusal:
    title = f"{resource.plural}.{resource.group}" if resource.group else resource.plural
    return Refusal(404, "NotFound", f'{title} "{name}" not found', {"name": name, "kind": resource.plural})


class Store:
    """All objects. Every method is atomic: none awaits."""

    def __init__(self, history: int) -> None:
        self.resources: list[Resource] = list(BUILTIN)
        self.revision = 1
        self._objects: dict[Key, dict[Place, Object]] = defaultdict(dict)
        self._history: dict[Key, deque[Change]] = defaultdict(lambda: deque(maxlen=history))
        self._dropped: dict[Key, int] = defaultdict(int)
        self._watchers: dict[Key, set[asyncio.Queue[Change]]] = defaultdict(set)
        self._owned: dict[str, set[tuple[Key, Place]]] = defaultdict(set)
        self._uids: set[str] = set()

    def resource(self, group: str, version: str, plural: str) -> Resource:
        wanted = (group, version, plural)
        for resource in self.resources:
            if (resource.group, resource.version, resource.plural) == wanted:
                return resource
        raise Refusal(404, "NotFound", "the server could not find the requested resource")

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        found = self._objects[(resource.group, resource.plural)].get((namespace, name))
        if found is None:
            raise not_found(resource, name)
        return found

    def select(self, resource: Resource, namespace: str) -> list[Object]:
        there = self._objects[(resource.group, resource.plural)]
        return [obj for (space, _), obj in there.items() if not namespace or space == namespace]

    def create(self, resource: Resource, obj: Object) -> Object:
        """Add `obj`, whose metadata has its name and namespace. Refuses a name that is taken."""
        namespace, name = place_of(obj)
        if (namespace, name) in self._objects[(resource.group, resource.plural)]:
            title = f"{resource.plural}.{resource.group}" if resource.group else resource.plural
            details = {"name": name, "kind": resource.plural}
            raise Refusal(409, "AlreadyExists", f'{title} "{name}" already exists', details)
        metadata = obj["metadata"]
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
        if resource.has_status or resource.schema is not None:
            metadata["generation"] = 1
        self._commit(resource, "ADDED", None, obj)
        return obj

    def update(self, resource: Resource, old: Object, new: Object) -> Object:
        """Replace `old` by `new`; the very same content makes no new revision."""
        if old == new:
            return old
        if new["metadata"].get("deletionTimestamp") and not new["metadata"].get("finalizers"):
            waits_for_kubelet = resource.plural == "pods" and new["metadata"].get("deletionGracePeriodSeconds")
            if not waits_for_kubelet:
                return self.remove(resource, new)
        self._commit(resource, "MODIFIED", old, new)
        return new

    def delete(self, resource: Resource, obj: Object, options: Object) -> Object:
        """Delete as the options say: gracefully for a pod on a node, later for an object with finalizers."""
        uid = (options.get("preconditions") or {}).get("uid")
        if uid and uid != obj["metadata"]["uid"]:
            raise Refusal(409, "Conflict", f"the UID in the precondition ({uid}) does not match the UID in record")
        new = copy.deepcopy(obj)
        grace = _grace_period(resource, obj, options)
        if options.get("propagationPolicy") == "Orphan":
            self._orphan(obj["metadata"]["uid"])
        owned = list(self._owned_by(obj["metadata"]["uid"]))
        if options.get("propagationPolicy") == "Foreground" and owned:
            new["metadata"]["finalizers"] = [*(new["metadata"].get("finalizers") or []), _FOREGROUND]
        if grace or new["metadata"].get("finalizers"):
            new["metadata"].setdefault("deletionTimestamp", now())
            new["metadata"]["deletionGracePeriodSeconds"] = grace
            self.update(resource, obj, new)
            if _FOREGROUND in (new["metadata"].get("finalizers") or []):
                self._collect(new["metadata"]["uid"])
            return new
        return self.remove(resource, new)

    def remove(self, resource: Resource, obj: Object) -> Object:
        """Take the object out, then everything it owned."""
        old = self._objects[(resource.group, resource.plural)].get(place_of(obj))
        self._commit(resource, "DELETED", old, copy.deepcopy(obj))
        if resource.plural == "namespaces":
            self._empty_namespace(obj["metadata"]["name"])
        self._collect(obj["metadata"]["uid"])
        self._release_owners(obj)
        return obj

    def collect_if_orphaned(self, resource: Resource, namespace: str, name: str) -> None:
        """Garbage-collect an object that was created when its owners were gone already."""
        obj = self._objects[(resource.group, resource.plural)].get((namespace, name))
        owners = obj["metadata"].get("ownerReferences") if obj else None
        if obj and owners and not any(owner["uid"] in self._uids for owner in owners):
            self.delete(resource, obj, {})

    def since(self, resource: Resource, revision: int) -> list[Change]:
        """The changes after `revision`; 410 where some of them are forgotten."""
        key = (resource.group, resource.plural)
        if revision < self._dropped[key]:
            message = f"too old resource version: {revision} ({self.revision})"
            raise Refusal(410, "Expired", message)
        return [change for change in self._history[key] if change.revision > revision]

    def subscribe(self, resource: Resource) -> "asyncio.Queue[Change]":
        queue: asyncio.Queue[Change] = asyncio.Queue()
        self._watchers[(resource.group, resource.plural)].add(queue)
        return queue

    def unsubscribe(self, resource: Resource, queue: "asyncio.Queue[Change]") -> None:
        self._watchers[(resource.group, resource.plural)].discard(queue)

    def _commit(self, resource: Resource, kind: str, old: Object | None, new: Object) -> None:
        key, place = (resource.group, resource.plural), place_of(new)
        self.revision += 1
        new["metadata"]["resourceVersion"] = str(self.revision)
        for owner in (old or {}).get("metadata", {}).get("ownerReferences") or []:
            self._owned[owner["uid"]].discard((key, place))
        if kind == "DELETED":
            del self._objects[key][place]
            self._uids.discard(new["metadata"]["uid"])
        else:
            self._objects[key][place] = new
            self._uids.add(new["metadata"]["uid"])
            for owner in new["metadata"].get("ownerReferences") or []:
                self._owned[owner["uid"]].add((key, place))
        change = Change(self.revision, kind, old, new)
        history = self._history[key]
        if len(history) == history.maxlen:
            self._dropped[key] = history[0].revision
        history.append(change)
        for queue in self._watchers[key]:
            queue.put_nowait(change)
        if resource == CRD:
            self._serve(new, gone=kind == "DELETED")

    def _serve(self, crd: Object, gone: bool) -> None:
        mine = from_crd(crd)
        self.resources = [r for r in self.resources if r not in mine] + ([] if gone else mine)
        if gone:
            for resource in mine:
                self._objects.pop((resource.group, resource.plural), None)

    def _owned_by(self, uid: str) -> Iterator[tuple[Resource, Object]]:
        for key, place in list(self._owned.get(uid, ())):
            obj = self._objects[key].get(place)
            resource = next((r for r in self.resources if (r.group, r.plural) == key), None)
            if obj and resource:
                yield resource, obj

    def _collect(self, uid: str) -> None:
        for resource, obj in self._owned_by(uid):
            others = [o for o in obj["metadata"]["ownerReferences"] if o["uid"] != uid and o["uid"] in self._uids]
            if others:
                continue
            self.delete(resource, obj, {})

    def _release_owners(self, obj: Object) -> None:
        """Let go of owners whose foreground deletion waited for `obj` alone."""
        for reference in obj["metadata"].get("ownerReferences") or []:
            group = reference["apiVersion"].rpartition("/")[0]
            for resource in [r for r in self.resources if (r.group, r.kind) == (group, reference["kind"])]:
                place = (obj["metadata"].get("namespace", "") if resource.namespaced else "", reference["name"])
                owner = self._objects[(resource.group, resource.plural)].get(place)
                finalizers = (owner or {}).get("metadata", {}).get("finalizers") or []
                if owner and _FOREGROUND in finalizers and not list(self._owned_by(owner["metadata"]["uid"])):
                    new = copy.deepcopy(owner)
                    new["metadata"]["finalizers"] = [f for f in finalizers if f != _FOREGROUND]
                    self.update(resource, owner, new)

    def _orphan(self, uid: str) -> None:
        for resource, obj in self._owned_by(uid):
            new = copy.deepcopy(obj)
            references = [owner for owner in new["metadata"]["ownerReferences"] if owner["uid"] != uid]
            new["metadata"]["ownerReferences"] = references
            self.update(resource, obj, new)

    def _empty_namespace(self, namespace: str) -> None:
        for resource in self.resources:
            if resource.namespaced:
                for obj in self.select(resource, namespace):
                    new = copy.deepcopy(obj)
                    new["metadata"]["finalizers"] = []
                    if place_of(obj) in self._objects[(resource.group, resource.plural)]:
                        self.remove(resource, new)


def _grace_period(resource: Resource, obj: Object, options: Object) -> int:
    """Seconds a pod may take to stop: 0 for one that never ran or is over, and for everything that is not a pod."""
    if resource.plural != "pods" or resource.group:
        return 0
    over = (obj.get("status") or {}).get("phase") in ("Succeeded", "Failed")
    if over or not obj["spec"].get("nodeName"):
        return 0
    asked = options.get("gracePeriodSeconds")
    return int(obj["spec"].get("terminationGracePeriodSeconds", 30) if asked is None else asked)
