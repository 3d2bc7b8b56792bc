"""Requests to the API server and their answers: plain dicts in and out. No other module sends any, except Kopf."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import aiohttp
from pydantic_core import to_json
from yarl import URL

from finetune_api import answers
from finetune_operator.core.objects import kinds, raw
from finetune_operator.core.objects.raw import Raw
from finetune_operator.kube.errors import ApiError, error_of, unreadable
from finetune_operator.kube.urls import resource_of

CHUNK_BYTES = 1 << 20
#: A watch that is silent for this long is dead: servers send bookmarks every minute, but none for events.
SILENCE_SECONDS = 70
WITHOUT_BOOKMARKS = (kinds.EVENT.plural,)
JSON = "application/json"
#: Ask for answers without spec, data and status where only the metadata matters.
METADATA_ONLY = f"{JSON};as=PartialObjectMetadata;g=meta.k8s.io;v=v1,{JSON}"


class Requests:
    """Sends requests and reads answers and watches.

    Every method raises ApiError for an answer of 400 or more, OSError when the connection fails, or TimeoutError.
    An answer of 200 that is no JSON object is a failed connection, too.

    Args:
        session: The session to send with.
        server: URL of the API server.
        timeout_seconds: Timeout of a request, but not of a watch.
        on_unreadable: Called with (resource, count) for objects that can be read in parts only, or not at all.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        server: str,
        timeout_seconds: float,
        on_unreadable: Callable[[str, int], None],
    ) -> None:
        self._session, self._server = session, server.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self.on_unreadable = on_unreadable

    async def request(
        self,
        method: str,
        where: str,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content_type: str = JSON,
        accept: str = JSON,
    ) -> Raw:
        """Send a request; return the answer as plain data."""
        data = await self.send(method, where, body, query, content_type, accept)
        try:
            found, is_whole = answers.read_object(data)
        except ValueError as error:
            raise unreadable(where, data, error) from None
        if not is_whole:
            self.on_unreadable(resource_of(where), 1)
        return found

    async def send(
        self,
        method: str,
        where: str,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content_type: str = JSON,
        accept: str = METADATA_ONLY,
        most: int | None = None,
    ) -> bytes:
        """Send a request; return the answer unparsed, because parsing takes longer than sending.

        Of an answer with more than `most` bytes the rest is not read.
        """
        headers = {"Content-Type": content_type, "Accept": accept}
        data = None if body is None else encoded(body)
        url = self._url(where, query)
        with _as_os_errors():
            async with self._session.request(method, url, data=data, headers=headers, timeout=self._timeout) as answer:
                found = await (answer.read() if most is None else _beginning(answer.content, most))
        if answer.status >= 400:
            raise error_of(answer.status, found)
        return found

    def _url(self, where: str, query: Mapping[str, str] | None) -> URL:
        """Return the URL. Paths hold Kubernetes names and need no quoting, which would be the slowest step here."""
        return URL(self._server + where + (f"?{urlencode(query)}" if query else ""), encoded=True)

    async def watch(self, where: str, query: Mapping[str, str], seconds: int) -> AsyncIterator[Raw]:
        """Yield the events of a watch, the present state first, until the server ends it after `seconds`."""
        common = {"watch": "true", "allowWatchBookmarks": "true", "resourceVersion": "0"}
        url = self._url(where, {**common, "timeoutSeconds": str(seconds), **query})
        silence = None if resource_of(where) in WITHOUT_BOOKMARKS else SILENCE_SECONDS
        timeout = aiohttp.ClientTimeout(total=seconds + 30, sock_read=silence)
        with _as_os_errors():
            async with self._session.get(url, headers={"Accept": JSON}, timeout=timeout) as answer:
                if answer.status >= 400:
                    raise error_of(answer.status, await answer.read())
                rest = b""
                async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield self._event(where, line)

    def _event(self, where: str, line: bytes) -> Raw:
        """Parse one line of a watch. Raises ApiError for an error that comes as an event, such as 410 Gone."""
        try:
            event, is_whole = answers.read_object(line)
        except ValueError as error:
            raise unreadable(where, line, error) from None
        if not is_whole:
            self.on_unreadable(resource_of(where), 1)
        if event.get("type") == "ERROR":
            status = raw.mapping(event, "object")
            raise ApiError(raw.integer(status, "code"), raw.text(status, "reason"), raw.text(status, "message"))
        return event


async def _beginning(content: aiohttp.StreamReader, most: int) -> bytes:
    """Return the content, or its first bytes, a few more than `most`, where it has more."""
    found = bytearray()
    while len(found) <= most and (chunk := await content.read(CHUNK_BYTES)):
        found += chunk
    return bytes(found)


def encoded(body: Any) -> bytes:
    """Encode as JSON for the API server, which accepts neither NaN nor infinity: such a number becomes null."""
    return to_json(body, inf_nan_mode="null")


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turn aiohttp's connection errors into OSErrors, which they are not by inheritance."""
    try:
        yield
    except aiohttp.ClientError as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
