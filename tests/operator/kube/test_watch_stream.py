"""The body of a watch as Kopf reads it: without echoes, and otherwise the same."""

import asyncio
import json
from typing import Any, cast

import pytest

from finetune_operator.kube.watch_stream import Events, show_event


def line_of(kind: str = "MODIFIED", **metadata: Any) -> bytes:
    return json.dumps({"type": kind, "object": {"metadata": metadata}}).encode()


@pytest.mark.parametrize(
    ("line", "version"),
    [
        (line_of(resourceVersion="17"), 17),
        (line_of(annotations={"resourceVersion": "3"}, resourceVersion="17"), 17),
        (line_of(annotations={"a": '{"resourceVersion":"3"}'}, resourceVersion="17"), 17),
        (line_of(labels={"resourceVersion": "3"}, annotations={"resourceVersion": "4"}), 0),
        (line_of(resourceVersion="x"), 0),
        (line_of(resourceVersion="9" * 5000), 0),
        (line_of("BOOKMARK", resourceVersion="18"), 18),
    ],
)
def test_an_event_is_an_echo_by_its_own_version_alone(line: bytes, version: int):
    asked: list[int] = []
    unreadable: list[None] = []
    shown = show_event(line, lambda asked_version: asked.append(asked_version) or True, lambda: unreadable.append(None))  # type: ignore[func-returns-value]
    assert (shown, asked, unreadable) == (None, [version], [])
    assert show_event(line, lambda version: False, lambda: None) == line


@pytest.mark.parametrize(
    "line", [b"", b"<html>", b"{}", b"[]", b'{"type":"ADDED"}', b'{"type":1,"object":{}}', line_of()[:-3]]
)
def test_what_is_no_event_is_counted_and_not_shown(line: bytes):
    unreadable: list[None] = []
    assert show_event(line, lambda version: False, lambda: unreadable.append(None)) is None
    assert unreadable == [None]


@pytest.mark.parametrize("levels", [200, 1_200, 9_000])
def test_an_event_that_nests_too_deep_is_cut_and_counted(levels: int):
    deep = "[" * levels + "]" * levels
    line = f'{{"type":"ADDED","object":{{"metadata":{{"resourceVersion":"5"}},"spec":{deep}}}}}'.encode()
    unreadable: list[None] = []
    shown = json.loads(show_event(line, lambda version: True, lambda: unreadable.append(None)) or b"")
    assert (shown["type"], shown["object"]["metadata"]) == ("ADDED", {"resourceVersion": "5"})
    assert unreadable == [None]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_watch_without_the_echoes_of_our_own_writes_is_otherwise_the_same(size: int):
    body = b'{"v":"1"}\n{"v":"2"}\n{"v":"3"}\n{"v":"4"}\n{"v":'

    async def act() -> None:
        content = asyncio.StreamReader()
        content.feed_data(body)
        content.feed_eof()
        signs: list[None] = []
        events = Events(
            cast(Any, content), lambda: signs.append(None), lambda line: None if b"2" in line or b"3" in line else line
        )
        chunks = [chunk async for chunk in events.iter_chunked(size)]
        assert b"".join(chunks) == b'{"v":"1"}\n{"v":"4"}\n', "without the one that is cut off"
        assert b"" not in chunks, "which would end the watch"
        assert len(signs) >= len(body) / size

    asyncio.run(act())
