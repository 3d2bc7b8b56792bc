"""A stand-in for the Kubernetes API server, for machines without its binaries.

Start it with `python -m support.standin.server --port 8001`.

It speaks enough of the API for the official clients, Kopf, kubectl and Helm: discovery, create, read, update, delete,
the four patch types, watches with resource versions and bookmarks, the status subresource, selectors, dry run, and
garbage collection by ownerReferences. FineTuneJobs get the CRD's defaults, are checked against its structural schema,
and, in place of CEL, against the models of finetune_api that hold the same rules.

It proves less than a real server: it has no authentication, RBAC, admission, quota or CEL, checks hardly anything of
built-in kinds, and its server-side apply knows no conflicts. Where the real binaries are, tests run against those.
"""

import argparse
import asyncio
import contextlib
import json
import urllib.parse
from typing import Any

import yaml
from aiohttp import web

from support.standin import protobuf, types
from support.standin.api import Api, Options, Target
from support.standin.logs import forward_log
from support.standin.selectors import matcher
from support.standin.store import Refusal, Store, not_found
from support.standin.table import table
from support.standin.watch import stream

Object = dict[str, Any]
API: web.AppKey[Api] = web.AppKey("api", Api)
BOOKMARK_SECONDS: web.AppKey[float] = web.AppKey("bookmark_seconds", float)


def _answer(body: Any, code: int = 200) -> web.Response:
    return web.Response(text=json.dumps(body), status=code, content_type="application/json")


@web.middleware
async def _refusals_as_status(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refusal as refusal:
        return _answer(refusal.status, refusal.code)
    except ValueError as error:
        return _answer(Refusal(400, "BadRequest", str(error)).status, 400)


def _parse(store: Store, path: str) -> Target:
    """What the URL path of an object or a collection names. Refuses (404) what is not served."""
    parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
    root, rest = parts[0], parts[1:]
    group, version, *rest = rest if root == "apis" else ["", *rest]
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
        namespace, rest = rest[1], rest[2:]
    plural, name, subresource = (*rest, "", "", "")[:3]
    return Target(store.resource(group, version, plural), namespace, name, subresource)


async def _body(request: web.Request) -> Any:
    if "protobuf" in request.content_type or "cbor" in request.content_type:
        if secret := protobuf.secret(await request.read()):
            return secret
        text = f"the body is in an unknown format: {request.content_type}; the stand-in reads JSON and YAML"
        raise Refusal(415, "UnsupportedMediaType", text)
    text = await request.text()
    if not text:
        return {}
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Refusal(400, "BadRequest", f"error decoding the body: {error}") from error


def _options(request: web.Request) -> Options:
    query = request.query
    return Options("dryRun" in query, query.get("fieldValidation") == "Strict", query.get("fieldManager", ""))


async def _read(request: web.Request, api: Api, target: Target) -> web.StreamResponse:
    resource = target.resource
    wants_table = "as=Table" in request.headers.get("Accept", "")
    if target.name:
        one = api.store.get(resource, target.namespace, target.name)
        return _answer(table(resource, [one], one["metadata"]["resourceVersion"]) if wants_table else one)
    matches = matcher(request.query.get("labelSelector", ""), request.query.get("fieldSelector", ""))
    if request.query.get("watch") in ("1", "true"):
        return await stream(request, api.store, resource, target.namespace, matches, request.app[BOOKMARK_SECONDS])
    found = sorted(filter(matches, api.store.select(resource, target.namespace)), key=_order)
    if wants_table:
        return _answer(table(resource, found, str(api.store.revision)))
    metadata = {"resourceVersion": str(api.store.revision)}
    body = {"kind": f"{resource.kind}List", "apiVersion": resource.group_version, "metadata": metadata}
    return _answer(body | {"items": found})


def _order(obj: Object) -> tuple[str, str]:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


async def _write(request: web.Request, api: Api, target: Target) -> web.Response:
    body, options = await _body(request), _options(request)
    if request.method == "POST":
        if target.subresource == "binding":
            return _answer(api.bind(target, body), 201)
        if target.subresource == "eviction":
            return _answer(api.evict(target, body), 201)
        created = api.create(target, body, options)
        if created["metadata"].get("ownerReferences") and not options.dry_run:
            place = (target.resource, target.namespace, created["metadata"]["name"])
            asyncio.get_running_loop().call_later(1, api.store.collect_if_orphaned, *place)
        return _answer(created, 201)
    if request.method == "PUT":
        return _answer(api.replace(target, body, options))
    if request.method == "PATCH":
        patched, created_now = api.patch(target, request.content_type, body, options)
        return _answer(patched, 201 if created_now else 200)
    return _answer(api.delete(target, _delete_options(request, body), options))


def _delete_options(request: web.Request, body: Object) -> Object:
    given = {key: request.query[key] for key in ("propagationPolicy", "gracePeriodSeconds") if key in request.query}
    return given | (body or {})


async def _delete_collection(request: web.Request, api: Api, target: Target) -> web.Response:
    body = _delete_options(request, await _body(request))
    matches = matcher(request.query.get("labelSelector", ""), request.query.get("fieldSelector", ""))
    for obj in filter(matches, api.store.select(target.resource, target.namespace)):
        with contextlib.suppress(Refusal):  # gone with its owner meanwhile
            here = api.store.get(target.resource, obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
            api.store.delete(target.resource, here, body)
    return _answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})


async def _objects(request: web.Request) -> web.StreamResponse:
    api = request.app[API]
    path = request.path.rstrip("/")
    if path.endswith(("/selfsubjectaccessreviews", "/selfsubjectrulesreviews")):
        return _answer(await _body(request) | {"status": {"allowed": True}}, 201)
    target = _parse(api.store, path)
    if target.subresource == "log" and request.method == "GET":
        return await forward_log(request, api.store, target.namespace, target.name)
    if target.subresource not in ("", "status", "binding", "eviction", "finalize"):
        raise not_found(target.resource, target.name)
    if request.method == "GET":
        return await _read(request, api, target)
    if request.method == "DELETE" and not target.name:
        return await _delete_collection(request, api, target)
    return await _write(request, api, target)


async def _discovery(request: web.Request) -> web.StreamResponse:
    resources = request.app[API].store.resources
    parts = request.path.strip("/").split("/")
    if parts == ["api"]:
        return _answer({"kind": "APIVersions", "versions": ["v1"]})
    if parts == ["apis"]:
        return _answer(types.api_groups(resources))
    if parts[0] == "apis" and len(parts) == 2:
        groups = types.api_groups(resources)["groups"]
        found = next((group for group in groups if group["name"] == parts[1]), None)
        if found is None:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        return _answer(found | {"kind": "APIGroup", "apiVersion": "v1"})
    group_version = "/".join(parts[1:])
    mine = [resource for resource in resources if resource.group_version == group_version]
    if not mine:
        raise Refusal(404, "NotFound", "the server could not find the requested resource")
    return _answer(types.resource_list(group_version, mine))


async def _openapi(request: web.Request) -> web.StreamResponse:
    resources = request.app[API].store.resources
    path = request.match_info.get("path")
    prefixed = {("apis/" if r.group else "api/") + r.group_version: r.group_version for r in resources}
    if not path:
        return _answer({"paths": {name: {"serverRelativeURL": f"/openapi/v3/{name}"} for name in prefixed}})
    return _answer(types.openapi([r for r in resources if r.group_version == prefixed.get(path)]))


async def _version(request: web.Request) -> web.StreamResponse:
    return _answer({"major": "1", "minor": "36", "gitVersion": types.GIT_VERSION})


async def _ready(request: web.Request) -> web.StreamResponse:
    return web.Response(text="ok")


def application(history: int, bookmark_seconds: float) -> web.Application:
    """The server, with the namespaces that every cluster has. `history` is how many changes a watch can look back."""
    app = web.Application(middlewares=[_refusals_as_status], client_max_size=2**24)
    api = app[API] = Api(Store(history))
    app[BOOKMARK_SECONDS] = bookmark_seconds
    for name in ("default", "kube-system"):
        namespaces = api.store.resource("", "v1", "namespaces")
        api.create(Target(namespaces, "", "", ""), {"metadata": {"name": name}}, Options(False, False, ""))
    for path in ("/readyz", "/livez", "/healthz"):
        app.router.add_get(path, _ready)
    app.router.add_get("/version", _version)
    for path in ("/api", "/apis", "/api/{v}", "/apis/{g}", "/apis/{g}/{v}", "/api/", "/apis/"):
        app.router.add_get(path, _discovery)
    app.router.add_get("/openapi/v3", _openapi)
    app.router.add_get("/openapi/v3/{path:.+}", _openapi)
    app.router.add_route("*", "/{path:apis?/.+}", _objects)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--history", type=int, default=100_000, help="changes per kind that a watch can look back")
    parser.add_argument("--bookmark-seconds", type=float, default=5)
    options = parser.parse_args()
    app = application(options.history, options.bookmark_seconds)
    web.run_app(app, host=options.host, port=options.port, print=None, access_log=None, shutdown_timeout=0.1)


if __name__ == "__main__":
    main()
