"""The body of a watch response as Kopf reads it: skip echoes, turn a 410 status into an event, find versions."""

from collections.abc import Callable

import aiohttp
from aiohttp.streams import AsyncStreamIterator


class Events:
    """The lines of a watch without those for which `skip` is true; `on_data` is called for every chunk.

    Half of all events echo our own writes, and Kopf takes longer for one event than a whole reconcile does.
    """

    def __init__(
        self, content: aiohttp.StreamReader, on_data: Callable[[], None], skip: Callable[[bytes], bool]
    ) -> None:
        self._content = content
        self._on_data, self._skip = on_data, skip
        self._rest = b""

    def __getattr__(self, name: str) -> object:
        return getattr(self._content, name)

    def iter_chunked(self, size: int) -> AsyncStreamIterator[bytes]:
        return AsyncStreamIterator(lambda: self._read(size))

    async def _read(self, size: int) -> bytes:
        """Return some whole lines, or the rest at the end."""
        while chunk := await self._content.read(size):
            self._on_data()
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            if kept := [line for line in lines if not self._skip(line)]:
                return b"\n".join([*kept, b""])
        rest, self._rest = self._rest, b""
        return rest


#: The event by which a server ends a watch whose resource version is too old.
_EXPIRED = b'{"type":"ERROR","object":{"kind":"Status","status":"Failure","reason":"Expired","code":410}}\n'


class Expired:
    """The body of a watch that was answered with status 410, as if the 410 came as an event.

    Kopf lists again after such an event; at the status it would stop, and all its other watches with it.
    """

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content, self._left = content, _EXPIRED

    def __getattr__(self, name: str) -> object:
        return getattr(self._content, name)

    def iter_chunked(self, size: int) -> AsyncStreamIterator[bytes]:
        return AsyncStreamIterator(self._read)

    async def _read(self) -> bytes:
        event, self._left = self._left, b""
        return event


_VERSION = b'"resourceVersion":"'


def version_in(line: bytes) -> int:
    """Return the resource version in a line of JSON without parsing it; 0 where there is none.

    Quotes within strings are escaped, so no text of a user can look like the key.
    """
    begin = line.find(_VERSION) + len(_VERSION)
    found = line[begin : line.find(b'"', begin)]
    return int(found) if begin >= len(_VERSION) and found.isdigit() else 0
