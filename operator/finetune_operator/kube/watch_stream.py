"""The body of a watch response as Kopf reads it: without echoes, cut where it is too deep, and a 410 as an event."""

from collections.abc import Callable

import aiohttp
from aiohttp.streams import AsyncStreamIterator
from pydantic_core import to_json

from finetune_api import answers
from finetune_operator.core.objects import raw


class Events:
    """The lines of a watch, each as `show` returns it, without those for which it returns None.

    Half of all events echo our own writes, and Kopf takes longer for one event than a whole reconcile does. `on_data`
    is called for every chunk.
    """

    def __init__(
        self, content: aiohttp.StreamReader, on_data: Callable[[], None], show: Callable[[bytes], bytes | None]
    ) -> None:
        self._content = content
        self._on_data, self._show = on_data, show
        self._rest = b""

    def __getattr__(self, name: str) -> object:
        return getattr(self._content, name)

    def iter_chunked(self, size: int) -> AsyncStreamIterator[bytes]:
        return AsyncStreamIterator(lambda: self._read(size))

    async def _read(self, size: int) -> bytes:
        """Return some whole lines, or nothing at the end. A line that is cut off there is no event."""
        while chunk := await self._content.read(size):
            self._on_data()
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            if shown := [line for line in map(self._show, lines) if line is not None]:
                return b"\n".join([*shown, b""])
        return b""


def show_event(line: bytes, is_echo: Callable[[int], bool], on_unreadable: Callable[[], None]) -> bytes | None:
    """Return a line of a watch as Kopf can read it; None for an echo, and for what is no event.

    Args:
        line: The line as the API server sent it.
        is_echo: Tells whether the object in that version only echoes a write of our own.
        on_unreadable: Called when the line cannot be read, or only in parts.
    """
    try:
        event, is_whole = answers.read_object(line)
        if not isinstance(event.get("object"), dict) or not isinstance(event.get("type"), str):
            raise ValueError("no event")
    except ValueError:
        on_unreadable()
        return None
    if not is_whole:
        on_unreadable()
        return to_json(event)
    return None if is_echo(raw.version(event["object"])) else line


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
