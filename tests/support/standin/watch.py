"""One watch: what was, then what comes, one JSON document a line."""

import asyncio
import json
import time
from typing import Any

from aiohttp import web

from support.standin.selectors import Match
from support.standin.store import Change, Refusal, Store
from support.standin.types import Resource

Object = dict[str, Any]
_TICK = 1.0


def event_for(change: Change, namespace: str, matches: Match) -> Object | None:
    """The event a watcher with this scope sees; an object that leaves the selector is DELETED for it."""
    if namespace and change.new["metadata"].get("namespace") != namespace:
        return None
    was = change.old is not None and matches(change.old)
    is_now = change.type != "DELETED" and matches(change.new)
    if is_now:
        return {"type": "MODIFIED" if was else "ADDED", "object": change.new}
    return {"type": "DELETED", "object": change.new} if was else None


def _bookmark(resource: Resource, revision: int, initial_end: bool = False) -> Object:
    metadata: Object = {"resourceVersion": str(revision), "creationTimestamp": None}
    if initial_end:
        metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
    body = {"kind": resource.kind, "apiVersion": resource.group_version, "metadata": metadata}
    return {"type": "BOOKMARK", "object": body}


async def stream(
    request: web.Request, store: Store, resource: Resource, namespace: str, matches: Match, bookmark_seconds: float
) -> web.StreamResponse:
    """Answer a watch request until its timeoutSeconds are over or the client leaves."""
    query = request.query
    since = query.get("resourceVersion") or "0"
    queue = store.subscribe(resource)
    try:
        if since == "0" or query.get("sendInitialEvents") == "true":
            first = [{"type": "ADDED", "object": o} for o in store.select(resource, namespace) if matches(o)]
            if query.get("sendInitialEvents") == "true":
                first.append(_bookmark(resource, store.revision, initial_end=True))
        else:
            events = (event_for(change, namespace, matches) for change in store.since(resource, int(since)))
            first = [event for event in events if event]
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        for event in first:
            await _send(response, event)
        deadline = time.monotonic() + float(query.get("timeoutSeconds") or 1800)
        bookmarks = query.get("allowWatchBookmarks") in ("true", "1", "True")
        pause = bookmark_seconds if bookmarks else 0
        await _follow(response, queue, deadline, resource, namespace, matches, pause, store)
        await response.write_eof()
        return response
    except (ConnectionResetError, Refusal) as error:
        if isinstance(error, Refusal):
            raise
        return response
    finally:
        store.unsubscribe(resource, queue)


async def _follow(
    response: web.StreamResponse,
    queue: "asyncio.Queue[Change]",
    deadline: float,
    resource: Resource,
    namespace: str,
    matches: Match,
    bookmark_seconds: float,
    store: Store,
) -> None:
    last_bookmark = time.monotonic()
    while (left := deadline - time.monotonic()) > 0:
        try:
            change = await asyncio.wait_for(queue.get(), min(_TICK, left))
        except TimeoutError:
            change = None
        event = event_for(change, namespace, matches) if change else None
        if event:
            await _send(response, event)
        if bookmark_seconds and queue.empty() and time.monotonic() - last_bookmark >= bookmark_seconds:
            last_bookmark = time.monotonic()
            await _send(response, _bookmark(resource, store.revision))


async def _send(response: web.StreamResponse, event: Object) -> None:
    await response.write(json.dumps(event).encode() + b"\n")
