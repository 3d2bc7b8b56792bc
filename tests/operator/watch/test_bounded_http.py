"""Trainers that mean harm, behind real sockets: what is read of them is bounded, and nothing waits for them.

The tests count bytes and the order of events, never time.
"""

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable

import pytest

from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.reconcile.work_queue import Result, WorkQueue
from finetune_operator.watch import bounded_http
from finetune_operator.watch.bounded_http import MAX_BYTES, BadAnswer, get
from finetune_operator.watch.progress import ProgressPoller

REPORT = json.dumps({"stage": "Training", "progress": {"step": 7}}).encode()
LAST_CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(REPORT[5:]), REPORT[5:])
OK = b"HTTP/1.1 200 OK\r\n"
Write = Callable[[bytes], Awaitable[None]]
Story = Callable[[Write], Awaitable[None]]


class Trainer:
    """A server that reads the request and tells its story. `sent` are the bytes that the other side took."""

    def __init__(self, story: Story) -> None:
        self._story, self.sent, self.asked = story, 0, asyncio.Event()

    async def __aenter__(self) -> "Trainer":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()
            self.sent += len(data)

        await reader.readuntil(b"\r\n\r\n")
        self.asked.set()
        try:
            await self._story(write)
        except OSError:  # the other side has hung up
            pass
        finally:
            writer.close()


def endless(data: bytes, start: bytes = b"") -> Story:
    async def story(write: Write) -> None:
        await write(start)
        while True:
            await write(data)

    return story


def whole(data: bytes) -> Story:
    return lambda write: write(data)


async def drip(write: Write) -> None:
    await write(OK)
    while True:
        await write(b"X")
        await asyncio.sleep(0)


async def never(write: Write) -> None:
    await asyncio.Event().wait()


HOSTILE: dict[str, Story] = {
    "informational answers without end": endless(b"HTTP/1.1 102 Processing\r\n\r\n" * 100),
    "continue without end": endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "a body without end": endless(b"x" * 8192, OK + b"\r\n"),
    "chunks without end": endless(b"5\r\nxxxxx\r\n" * 500, OK + b"Transfer-Encoding: chunked\r\n\r\n"),
    "headers without end": endless(b"X-A: b\r\n" * 500, OK),
    "one header without end": endless(b"x" * 8192, OK + b"X-A: "),
    "a status line without end": endless(b"x" * 8192),
}
USELESS: dict[str, Story] = {
    "nothing": whole(b""),
    "no HTTP": whole(b"SSH-2.0-OpenSSH_9.9\r\n"),
    "closed within the headers": whole(OK + b"Content-Le"),
    "closed within the body": whole(OK + b"Content-Length: 500\r\n\r\n" + REPORT),
    "chunks that are none": whole(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n"),
    "another status": whole(b"HTTP/1.1 500 Oh\r\n\r\n" + REPORT),
    "a redirect": whole(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\n\r\n"),
    "an informational answer alone": whole(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "a hundred thousand of them": whole(b"HTTP/1.1 100 Continue\r\n\r\n" * 2_000),
    "more headers than anyone has": whole(OK + b"a: b\r\n" * 5_000 + b"\r\n" + REPORT),
    "a length that is none": whole(OK + b"Content-Length: -7\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"),
}


def run(story: Story, act: Callable[[Trainer], Awaitable[None]]) -> None:
    async def both() -> None:
        async with asyncio.timeout(60), Trainer(story) as trainer:
            await act(trainer)

    asyncio.run(both())


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: %d\r\n\r\n" % len(REPORT) + REPORT,
        OK + b"\r\n" + REPORT,
        b"HTTP/1.0 200 OK\r\n\r\n" + REPORT,
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + REPORT[:5] + b"\r\n" + LAST_CHUNKS,
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"\r\n" + REPORT,
    ],
)
def test_an_honest_answer_is_read(answer: bytes):
    async def act(trainer: Trainer) -> None:
        assert await get("127.0.0.1", trainer.port, "/progress", 30) == REPORT

    run(whole(answer), act)


@pytest.mark.parametrize("name", HOSTILE)
def test_of_an_answer_without_end_a_bounded_number_of_bytes_is_read(name: str, monkeypatch: pytest.MonkeyPatch):
    read = []
    monkeypatch.setattr(bounded_http, "PAUSE_SECONDS", 0)

    async def act(trainer: Trainer) -> None:
        loop = asyncio.get_running_loop()
        receive = loop.sock_recv

        async def counted(connection: object, size: int) -> bytes:
            data = await receive(connection, size)  # type: ignore[arg-type]
            read.append(len(data))
            return data

        loop.sock_recv = counted  # type: ignore[method-assign,assignment]
        with pytest.raises(BadAnswer, match="more than 65536 bytes"):
            await get("127.0.0.1", trainer.port, "/progress", 30)
        assert sum(read) == MAX_BYTES + 1

    run(HOSTILE[name], act)


@pytest.mark.parametrize("name", USELESS)
def test_what_is_no_answer_is_told_from_one(name: str):
    async def act(trainer: Trainer) -> None:
        with pytest.raises(BadAnswer):
            await get("127.0.0.1", trainer.port, "/progress", 30)

    run(USELESS[name], act)


@pytest.mark.parametrize("story", [drip, never])
def test_who_takes_his_time_gets_no_more_of_it_and_few_turns(story: Story):
    async def act(trainer: Trainer) -> None:
        with pytest.raises(TimeoutError):
            await get("127.0.0.1", trainer.port, "/progress", 0.2)

    run(story, act)


def test_compressed_data_stays_compressed():
    bomb = gzip.compress(b"x" * 10_000_000)

    async def act(trainer: Trainer) -> None:
        assert await get("127.0.0.1", trainer.port, "/progress", 30) == bomb

    run(whole(OK + b"Content-Encoding: gzip\r\n\r\n" + bomb), act)


@pytest.mark.parametrize("ip", ["", "localhost", "metadata.google.internal", "127.0.0.1@evil", "1.2.3.4\r\nX: y"])
def test_no_name_is_looked_up(ip: str):
    with pytest.raises(BadAnswer):
        asyncio.run(get(ip, 1, "/progress", 1))


def test_a_thousand_hostile_trainers_take_no_turn_from_the_reconciles_and_an_honest_one_is_heard():
    """Order, not time: ten reconciles in a row and a report come in while every hostile trainer still talks."""
    stories = [*HOSTILE.values(), drip, never]
    honest, count = ObjectKey("FineTuneJob", "good", "job"), 1_000

    async def act() -> None:
        servers = [Trainer(stories[index % len(stories)]) for index in range(len(stories))]
        good = Trainer(whole(OK + b"\r\n" + REPORT))
        ports: dict[str, int] = {}
        for index, server in enumerate([*servers, good]):
            await server.__aenter__()
            ports[f"127.0.0.{index + 1}"] = server.port
        heard, done = asyncio.Event(), asyncio.Queue[ObjectKey]()
        poller = ProgressPoller(15, 3, 32, lambda key: heard.set() if key == honest else None)

        async def reconcile(key: ObjectKey) -> Result:
            done.put_nowait(key)
            return Result()

        queue = WorkQueue(reconcile, 1, on_done=lambda *_: None)
        real = bounded_http.get

        async def by_ip(ip: str, port: int, path: str, seconds: float) -> bytes:
            return await real("127.0.0.1", ports[ip], path, seconds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bounded_http, "get", by_ip)
            tasks = [asyncio.create_task(poller.run()), asyncio.create_task(queue.run())]
            poller.follow(honest, "pod", f"127.0.0.{len(servers) + 1}")
            for index in range(count):
                poller.follow(
                    ObjectKey("FineTuneJob", "evil", f"j{index}"), "pod", f"127.0.0.{index % len(servers) + 1}"
                )
            for _ in range(10):
                queue.add(honest)
                assert await done.get() == honest
            await heard.wait()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for server in [*servers, good]:
            await server.__aexit__()

    asyncio.run(asyncio.wait_for(act(), 60))
