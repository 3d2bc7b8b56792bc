"""Which resources the stand-in API server knows, and the discovery documents that say so."""

from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]
VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
GIT_VERSION = "v1.36.0-standin"


_SHORT_NAMES = {
    "configmaps": "cm",
    "customresourcedefinitions": "crd",
    "events": "ev",
    "namespaces": "ns",
    "persistentvolumeclaims": "pvc",
    "pods": "po",
    "serviceaccounts": "sa",
    "services": "svc",
}


@dataclass(frozen=True)
class Resource:
    """One served resource of one API version."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    has_status: bool = False
    short_names: tuple[str, ...] = ()
    schema: Object | None = field(default=None, compare=False, hash=False)
    columns: tuple[Object, ...] = field(default=(), compare=False, hash=False)

    @property
    def group_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


def _builtin(group_version: str, *kinds: str) -> list[Resource]:
    """Kinds as 'plural:Kind', with '*' for cluster-wide and '+' for those with a status."""
    group, _, version = group_version.rpartition("/")
    found = []
    for entry in kinds:
        plural, kind = entry.rstrip("*+").split(":")
        short = (_SHORT_NAMES[plural],) if plural in _SHORT_NAMES else ()
        found.append(Resource(group, version, plural, kind, "*" not in entry, "+" in entry, short))
    return found


BUILTIN = [
    *_builtin("v1", "namespaces:Namespace*+", "nodes:Node*+", "configmaps:ConfigMap", "secrets:Secret"),
    *_builtin("v1", "services:Service+", "serviceaccounts:ServiceAccount", "pods:Pod+", "events:Event"),
    *_builtin("v1", "persistentvolumeclaims:PersistentVolumeClaim+", "resourcequotas:ResourceQuota+"),
    *_builtin("batch/v1", "jobs:Job+"),
    *_builtin("apps/v1", "deployments:Deployment+"),
    *_builtin("coordination.k8s.io/v1", "leases:Lease"),
    *_builtin("events.k8s.io/v1", "events:Event"),
    *_builtin("networking.k8s.io/v1", "networkpolicies:NetworkPolicy"),
    *_builtin("policy/v1", "poddisruptionbudgets:PodDisruptionBudget+"),
    *_builtin("scheduling.k8s.io/v1", "priorityclasses:PriorityClass*"),
    *_builtin("rbac.authorization.k8s.io/v1", "roles:Role", "rolebindings:RoleBinding"),
    *_builtin("rbac.authorization.k8s.io/v1", "clusterroles:ClusterRole*", "clusterrolebindings:ClusterRoleBinding*"),
    *_builtin("apiextensions.k8s.io/v1", "customresourcedefinitions:CustomResourceDefinition*+"),
]
CRD = next(resource for resource in BUILTIN if resource.kind == "CustomResourceDefinition")


def from_crd(crd: Object) -> list[Resource]:
    """What a CustomResourceDefinition adds."""
    spec = crd["spec"]
    return [
        Resource(
            group=spec["group"],
            version=version["name"],
            plural=spec["names"]["plural"],
            kind=spec["names"]["kind"],
            namespaced=spec["scope"] == "Namespaced",
            has_status="status" in (version.get("subresources") or {}),
            short_names=tuple(spec["names"].get("shortNames", ())),
            schema=(version.get("schema") or {}).get("openAPIV3Schema"),
            columns=tuple(version.get("additionalPrinterColumns") or ()),
        )
        for version in spec["versions"]
        if version.get("served", True)
    ]


def api_groups(resources: list[Resource]) -> Object:
    """The body of /apis."""
    groups: dict[str, list[str]] = {}
    for resource in resources:
        versions = groups.setdefault(resource.group, []) if resource.group else []
        if resource.version not in versions:
            versions.append(resource.version)
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [api_group(name, v) for name, v in groups.items()]}


def api_group(name: str, versions: list[str]) -> Object:
    entries = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    group = {"kind": "APIGroup", "apiVersion": "v1", "name": name}
    return group | {"versions": entries, "preferredVersion": entries[0]}


def resource_list(group_version: str, resources: list[Resource]) -> Object:
    """The body of /api/v1 or /apis/<group>/<version>."""
    entries: list[Object] = []
    for resource in resources:
        entry = {"name": resource.plural, "singularName": resource.kind.lower(), "kind": resource.kind}
        entry |= {"namespaced": resource.namespaced}
        entries.append(entry | {"verbs": VERBS, "shortNames": list(resource.short_names)})
        if resource.has_status:
            entries.append(entry | {"name": f"{resource.plural}/status", "verbs": ["get", "patch", "update"]})
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": entries}


def openapi(resources: list[Resource]) -> Object:
    """The least of /openapi/v3/<gv> that lets kubectl leave field validation to the server."""
    query = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in ("dryRun", "fieldValidation")]
    paths: Object = {}
    for resource in resources:
        root = f"/apis/{resource.group_version}" if resource.group else "/api/v1"
        place = f"{root}/namespaces/{{namespace}}" if resource.namespaced else root
        gvk = {"group": resource.group, "version": resource.version, "kind": resource.kind}
        patch = {"parameters": query, "x-kubernetes-group-version-kind": gvk, "x-kubernetes-action": "patch"}
        patch |= {"responses": {"200": {"description": "OK"}}}
        paths[f"{place}/{resource.plural}/{{name}}"] = {"patch": patch}
    info = {"title": "Kubernetes stand-in", "version": GIT_VERSION}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": {}}}
