"""API paths of the kinds we use, and what a request path says: resource, namespace, verb."""

from finetune_api import constants


def resource_of(path: str) -> str:
    """The plural, with its subresource, that a URL path addresses: 'jobs', 'finetunejobs/status'."""
    parts = path.strip("/").split("/")
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    if len(rest) > 2 and rest[0] == "namespaces":
        rest = rest[2:]
    return "/".join((rest[0], rest[2])) if len(rest) > 2 else rest[0] if rest else "discovery"


def namespace_of(path: str) -> str:
    """The namespace in a URL path; empty where there is none."""
    parts = path.split("/")
    return parts[parts.index("namespaces") + 1] if "namespaces" in parts[:-1] else ""


def verb_of(method: str, url_path: str, is_watch: bool) -> str:
    if is_watch:
        return "watch"
    if method != "GET":
        return {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}.get(method, method.lower())
    parts = url_path.strip("/").split("/")
    named = parts[2:] if parts[0] == "api" else parts[3:]
    return "get" if len(named) in (2, 4, 5) else "list"


#: Kind -> collection path; {} is the namespace part, empty for all namespaces.
PATHS: dict[str, str] = {
    constants.KIND: f"/apis/{constants.API_VERSION}{{}}/{constants.PLURAL}",
    "Job": "/apis/batch/v1{}/jobs",
    "Pod": "/api/v1{}/pods",
    "Service": "/api/v1{}/services",
    "Event": "/api/v1{}/events",
}


def path(kind: str, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
    """URL path of a collection, an object or a subresource."""
    base = PATHS[kind].format(f"/namespaces/{namespace}" if namespace else "")
    return "/".join(part for part in (base, name, subresource) if part)
