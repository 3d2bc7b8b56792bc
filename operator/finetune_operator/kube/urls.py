"""API paths: how to build the path of an object, and which resource, namespace and verb a request path names."""

from finetune_operator.core.objects.kinds import Kind


def resource_of(path: str) -> str:
    """Return the plural, with its subresource, that a URL path addresses: 'jobs', 'finetunejobs/status'."""
    parts = path.strip("/").split("/")
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    if len(rest) > 2 and rest[0] == "namespaces":
        rest = rest[2:]
    return "/".join((rest[0], rest[2])) if len(rest) > 2 else rest[0] if rest else "discovery"


def namespace_of(path: str) -> str:
    """Return the namespace in a URL path; empty where there is none."""
    parts = path.split("/")
    return parts[parts.index("namespaces") + 1] if "namespaces" in parts[:-1] else ""


def verb_of(method: str, url_path: str, is_watch: bool) -> str:
    """Return the verb as RBAC names it."""
    if is_watch:
        return "watch"
    if method != "GET":
        return {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}.get(method, method.lower())
    parts = url_path.strip("/").split("/")
    named = parts[2:] if parts[0] == "api" else parts[3:]
    return "get" if len(named) in (2, 4, 5) else "list"


def path(kind: Kind, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
    """Return the URL path of a collection, an object or a subresource. No namespace: all namespaces."""
    root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
    base = f"{root}/namespaces/{namespace}/{kind.plural}" if namespace else f"{root}/{kind.plural}"
    return "/".join(part for part in (base, name, subresource) if part)
