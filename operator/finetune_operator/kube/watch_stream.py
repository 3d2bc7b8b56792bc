"""The body of a watch request as Kopf reads it: bookmarks, expiry and resource versions."""

from collections.abc import Callable

import aiohttp
from aiohttp.streams import AsyncStreamIterator


class Events:
    """The body of a watch, line by line: `note` is told of every sign of life, and lines that `skip` are left out.

    Half of all events are echoes of our own writes, and Kopf takes longer over an event than we do over the whole job.
    """

    def __init__(self, content: aiohttp.StreamReader, note: Callable[[], None], skip: Callable[[bytes], bool]) -> None:
        self._content = content
        self._note, self._skip = note, skip
        self._rest = b""

    def __getattr__(self, name: str) -> object:
        return getattr(self._content, name)

    def iter_chunked(self, size: int) -> AsyncStreamIterator[bytes]:
        return AsyncStreamIterator(lambda: self._read(size))

    async def _read(self, size: int) -> bytes:
        """Some whole lines, or what is left at the end."""
        while chunk := await self._content.read(size):
            self._note()
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            if kept := [line for line in lines if not self._skip(line)]:
                return b"\n".join([*kept, b""])
        rest, self._rest = self._rest, b""
        return rest


#: What a server says in a watch that is too old for it.
_EXPIRED = b'{"type":"ERROR","object":{"kind":"Status","status":"Failure","reason":"Expired","code":410}}\n'


class Expired:
    """The body of a watch that was answered 410, as if the server had said so in the watch. Kopf then lists anew; at
    the status it would give up, and all its other watches with it."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content, self._left = content, _EXPIRED

    def __getattr__(self, name: str) -> object:
        return getattr(self._content, name)

    def iter_chunked(self, size: int) -> AsyncStreamIterator[bytes]:
        return AsyncStreamIterator(self._read)

    async def _read(self) -> bytes:
        said, self._left = self._left, b""
        return said


_VERSION = b'"resourceVersion":"'


def version_in(line: bytes) -> int:
    """The resource version in a line of JSON without reading it all; 0 where there is none. Quotes within strings are
    escaped, so no text of a user's can look like the key."""
    begin = line.find(_VERSION) + len(_VERSION)
    found = line[begin : line.find(b'"', begin)]
    return int(found) if begin >= len(_VERSION) and found.isdigit() else 0
