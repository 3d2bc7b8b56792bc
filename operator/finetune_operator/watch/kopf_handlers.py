"""Kopf's handlers: pass every event of the watched kinds on, and do nothing else.

Only `on.event` is used: it leaves no annotation and no finalizer on any object.
"""

from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
import kopf

from finetune_operator.core.objects.kinds import Kind
from finetune_operator.kube.session import Connection
from finetune_operator.kube.urls import namespace_of, resource_of
from finetune_operator.watch.source import WatchEvent


def kopf_registry(
    kinds: Iterable[Kind], emit: Callable[[WatchEvent], None], login: Callable[[], Any]
) -> kopf.OperatorRegistry:
    """Return Kopf's registry with our handlers. `emit` gets every event."""
    made = kopf.OperatorRegistry()

    @kopf.on.login(registry=made)  # type: ignore[untyped-decorator]
    async def log_in(**_: Any) -> Any:
        return login()

    def watch(kind: Kind) -> None:
        @kopf.on.event(kind.group, kind.version, kind.plural, id=f"see-{kind.plural}", registry=made)  # type: ignore[untyped-decorator]
        async def see(event: dict[str, Any], **_: Any) -> None:
            emit(WatchEvent(event.get("type"), kind.name, dict(event.get("object") or {})))

    for kind in kinds:
        watch(kind)
    return made


def kopf_login(connection: Connection, on_list: Callable[[str, str], None]) -> kopf.AiohttpSession:
    """Return the session that Kopf asks for and closes. `on_list` gets (resource, namespace) of each list."""

    async def note_list(session: aiohttp.ClientSession, context: object, params: aiohttp.TraceRequestEndParams) -> None:
        url = params.url
        if params.response.status == 200 and "watch" not in url.query and "continue" not in url.query:
            on_list(resource_of(url.path), namespace_of(url.path))

    lists = aiohttp.TraceConfig()
    lists.on_request_end.append(note_list)
    return kopf.AiohttpSession(aiohttp_session=connection.session(lists), server=connection.configuration.host)
