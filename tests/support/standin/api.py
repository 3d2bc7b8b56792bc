"""What the stand-in does for one request on objects: create, update, patch, delete, in the API server's order."""

import copy
from dataclasses import dataclass
from typing import Any

from support.standin import patch as standin_patch
from support.standin.rules import (
    invalid,
    normalized,
    refusals,
    with_job_selector,
)
from support.standin.store import Refusal, Store, now
from support.standin.types import Resource

Object = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What a URL names."""

    resource: Resource
    namespace: str
    name: str
    subresource: str


@dataclass(frozen=True)
class Options:
    """The query parameters of a write."""

    dry_run: bool
    strict: bool
    manager: str


class Api:
    """Writes on the store. Every method is atomic: none awaits."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._applied: dict[tuple[str, str, str], Object] = {}

    def create(self, target: Target, body: Object, options: Options) -> Object:
        resource = target.resource
        obj = normalized(resource, body, options.strict)
        metadata = obj["metadata"]
        for stale in ("uid", "resourceVersion", "creationTimestamp", "generation", "deletionTimestamp"):
            metadata.pop(stale, None)
        if resource.namespaced:
            if metadata.get("namespace", target.namespace) != target.namespace:
                text = "the namespace of the provided object does not match the namespace sent on the request"
                raise Refusal(400, "BadRequest", text)
            metadata["namespace"] = target.namespace
            self._require_namespace(target.namespace)
        if resource.has_status and resource.kind not in ("Pod", "Namespace", "CustomResourceDefinition"):
            obj.pop("status", None)
        causes = refusals(resource, obj, None)
        if causes:
            raise invalid(resource, metadata.get("name", ""), causes)
        if options.dry_run:
            metadata |= {"uid": "00000000-0000-0000-0000-000000000000", "creationTimestamp": now()}
            return obj
        self.store.create(resource, obj)
        if resource.kind == "Job":
            with_job_selector(obj)
        if resource.kind == "CustomResourceDefinition":
            self._establish(resource, obj)
        return obj

    def replace(self, target: Target, body: Object, options: Options) -> Object:
        old = self.store.get(target.resource, target.namespace, target.name)
        return self._store_new(target, old, body, options)

    def patch(self, target: Target, content_type: str, body: Any, options: Options) -> tuple[Object, bool]:
        """The patched object, and whether it was created (by an apply)."""
        resource = target.resource
        if content_type.startswith("application/apply-patch"):
            return self._apply(target, body, options)
        old = self.store.get(resource, target.namespace, target.name)
        if content_type.startswith("application/json-patch"):
            try:
                new = standin_patch.json_patch(old, body)
            except standin_patch.PatchError as error:
                raise Refusal(422, "Invalid", str(error)) from error
        elif content_type.startswith("application/strategic-merge-patch"):
            if resource.schema is not None:
                text = "the body of the request was in an unknown format - accepted media types include: "
                accepted = "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml"
                raise Refusal(415, "UnsupportedMediaType", text + accepted)
            new = standin_patch.strategic(old, body)
        else:
            new = standin_patch.merge(old, body)
        return self._store_new(target, old, new, options), False

    def delete(self, target: Target, body: Object, options: Options) -> Object:
        obj = self.store.get(target.resource, target.namespace, target.name)
        return obj if options.dry_run else self.store.delete(target.resource, obj, body)

    def bind(self, target: Target, body: Object) -> Object:
        """POST pods/<name>/binding: what the scheduler does."""
        old = self.store.get(target.resource, target.namespace, target.name)
        if old["spec"].get("nodeName"):
            text = f'Operation cannot be fulfilled on pods/binding "{target.name}": pod {target.name} is already'
            raise Refusal(409, "Conflict", f'{text} assigned to node "{old["spec"]["nodeName"]}"')
        new = copy.deepcopy(old)
        new["spec"]["nodeName"] = body["target"]["name"]
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": now()}
        new["status"] = standin_patch.strategic(new.get("status"), {"conditions": [scheduled]})
        self.store.update(target.resource, old, new)
        return {"kind": "Status", "apiVersion": "v1", "status": "Success", "code": 201}

    def evict(self, target: Target, body: Object) -> Object:
        """POST pods/<name>/eviction: what `kubectl drain` does (no disruption budgets here)."""
        old = self.store.get(target.resource, target.namespace, target.name)
        new = copy.deepcopy(old)
        condition = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
        condition |= {"message": "Eviction API: evicting", "lastTransitionTime": now()}
        new["status"] = standin_patch.strategic(new.get("status"), {"conditions": [condition]})
        self.store.update(target.resource, old, new)
        self.store.delete(target.resource, new, body.get("deleteOptions") or {})
        return {"kind": "Status", "apiVersion": "v1", "status": "Success", "code": 201}

    def _apply(self, target: Target, body: Object, options: Options) -> tuple[Object, bool]:
        if not options.manager:
            text = "PatchOptions.meta.k8s.io: fieldManager: Required value: is required for apply patch"
            raise Refusal(422, "Invalid", text)
        resource = target.resource
        key = (f"{resource.group}/{resource.plural}", f"{target.namespace}/{target.name}", options.manager)
        try:
            old = self.store.get(resource, target.namespace, target.name)
        except Refusal:
            if target.subresource:
                raise
            body.setdefault("metadata", {})["name"] = target.name
            created = self.create(target, body, options)
            if not options.dry_run:
                self._applied[(*key[:2], options.manager + created["metadata"]["uid"])] = copy.deepcopy(body)
            return created, True
        key = (*key[:2], options.manager + target.subresource + old["metadata"]["uid"])
        new = standin_patch.apply(old, body, self._applied.get(key))
        new["metadata"]["managedFields"] = None
        stored = self._store_new(target, old, new, options)
        if not options.dry_run:
            self._applied[key] = copy.deepcopy(body)
        return stored, False

    def _store_new(self, target: Target, old: Object, body: Object, options: Options) -> Object:
        """Check and store `body` in place of `old`; status and the rest of an object never change each other."""
        resource = target.resource
        new = normalized(resource, body, options.strict)
        self._check_version(target, old, new)
        kept = (
            "uid",
            "creationTimestamp",
            "generation",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "namespace",
        )
        for key in kept:
            new["metadata"].pop(key, None)
            if key in old["metadata"]:
                new["metadata"][key] = old["metadata"][key]
        new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        if target.subresource == "status":
            new = copy.deepcopy(old) | {"status": new.get("status") or {}}
        elif resource.has_status:
            new.pop("status", None)
            if "status" in old:
                new["status"] = copy.deepcopy(old["status"])
        if "generation" in old["metadata"] and new.get("spec") != old.get("spec"):
            new["metadata"]["generation"] = old["metadata"]["generation"] + 1
        causes = refusals(resource, new, old)
        if causes:
            raise invalid(resource, target.name, causes)
        return new if options.dry_run else self.store.update(resource, old, new)

    def _check_version(self, target: Target, old: Object, new: Object) -> None:
        wanted, uid = new["metadata"].get("resourceVersion"), new["metadata"].get("uid")
        title = f"{target.resource.plural}.{target.resource.group}" if target.resource.group else target.resource.plural
        start = f'Operation cannot be fulfilled on {title} "{target.name}": '
        if new["metadata"].get("name") != target.name:
            raise Refusal(400, "BadRequest", "the name of the object does not match the name on the URL")
        if wanted and wanted != old["metadata"]["resourceVersion"]:
            text = "the object has been modified; please apply your changes to the latest version and try again"
            raise Refusal(409, "Conflict", start + text)
        if uid and uid != old["metadata"]["uid"]:
            raise Refusal(409, "Conflict", f"{start}Precondition failed: UID in precondition: {uid}")

    def _require_namespace(self, namespace: str) -> None:
        found = self.store.get(self.store.resource("", "v1", "namespaces"), "", namespace)
        if found["metadata"].get("deletionTimestamp"):
            text = f"unable to create new content in namespace {namespace} because it is being terminated"
            raise Refusal(403, "Forbidden", text)

    def _establish(self, resource: Resource, crd: Object) -> None:
        new = copy.deepcopy(crd)
        conditions = [
            {"type": kind, "status": "True", "reason": "Served", "lastTransitionTime": now()}
            for kind in ("NamesAccepted", "Established")
        ]
        versions = [version["name"] for version in crd["spec"]["versions"]]
        new["status"] = {"conditions": conditions, "acceptedNames": crd["spec"]["names"], "storedVersions": versions}
        self.store.update(resource, crd, new)
