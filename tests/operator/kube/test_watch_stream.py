"""The body of a watch as Kopf reads it: without echoes, and otherwise the same."""

import asyncio
import json
from typing import Any, cast

import pytest

from finetune_operator.kube.watch_stream import Events, version_in


@pytest.mark.parametrize(
    ("line", "version"),
    [
        (
            json.dumps({"type": "MODIFIED", "object": {"metadata": {"resourceVersion": "17"}}}, separators=(",", ":")),
            17,
        ),
        (json.dumps({"annotations": {"a": '{"resourceVersion":"3"}'}}, separators=(",", ":")), 0),
        ('{"object":{"metadata":{"resourceVersion":"x"}}}', 0),
        ('{"object":{"metadata":{"resourceVersion":"', 0),
        ("", 0),
    ],
)
def test_the_version_of_an_event_is_found_without_reading_it(line: str, version: int):
    assert version_in(line.encode()) == version


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_watch_without_the_echoes_of_our_own_writes_is_otherwise_the_same(size: int):
    body = b'{"v":"1"}\n{"v":"2"}\n{"v":"3"}\n{"v":"4"}'

    async def act() -> None:
        content = asyncio.StreamReader()
        content.feed_data(body)
        content.feed_eof()
        signs: list[None] = []
        events = Events(cast(Any, content), lambda: signs.append(None), lambda line: b"2" in line or b"3" in line)
        chunks = [chunk async for chunk in events.iter_chunked(size)]
        assert b"".join(chunks) == b'{"v":"1"}\n{"v":"4"}'
        assert b"" not in chunks, "which would end the watch"
        assert len(signs) >= len(body) / size

    asyncio.run(act())
