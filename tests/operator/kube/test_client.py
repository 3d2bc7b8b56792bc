"""What the client makes of answers that are not what was asked for: a real socket, and any bytes."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from api.manifests import nested
from finetune_operator.core.objects import raw
from finetune_operator.kube.client import PAGE, KubeClient
from finetune_operator.kube.errors import ApiError, UnreadableAnswer
from finetune_operator.watch.cache import Cache
from finetune_operator.watch.relist import Relister

HTML = b"<!DOCTYPE html><html><body>Sign in</body></html>"
NO_OBJECTS = (HTML, b"", b"null", b"[]", b"7", b'"text"', b'{"kind":', b"\xff\xfe", b"{" * 5000)
NO_LISTS = (*NO_OBJECTS, b"{}", b'{"items":[]}', b'{"items":[],"metadata":{}}', b'{"metadata":{"resourceVersion":"7"}}')
Answer = Callable[[web.Request], bytes]


def job(name: str, version: int = 5, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "team", "uid": f"uid-{name}", "resourceVersion": str(version)}
    return {"kind": "FineTuneJob", "metadata": metadata, "spec": spec}


def listed(*items: Any, token: str = "") -> bytes:
    return json.dumps({"metadata": {"resourceVersion": "7", "continue": token}, "items": items}).encode()


def names(cache: Cache) -> set[str]:
    return {key.name for key in cache.keys()}  # noqa: SIM118 -- no dict


class Talk:
    """A client whose server answers what the test says, with the status 200."""

    def __init__(self, client: KubeClient, unreadable: list[tuple[str, int]]) -> None:
        self.client, self.unreadable = client, unreadable


def talk(answer: Answer, act: Callable[[Talk], Awaitable[None]]) -> None:
    async def run() -> None:
        async def handle(request: web.Request) -> web.Response:
            return web.Response(body=answer(request), content_type="text/html")

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        unreadable: list[tuple[str, int]] = []
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            client = KubeClient(session, url, 5, (), lambda resource, count: unreadable.append((resource, count)))
            await act(Talk(client, unreadable))
        await runner.cleanup()

    asyncio.run(run())


def relister(client: KubeClient, cache: Cache, restored: list[None]) -> Relister:
    def note(_: object) -> None:
        pass

    return Relister(client, cache, ("team",), 300, note, note, lambda: restored.append(None))


@pytest.mark.parametrize("body", NO_OBJECTS)
def test_an_answer_that_is_no_object_is_a_failed_connection(body: bytes):
    async def act(talk: Talk) -> None:
        for call in (
            talk.client.get("FineTuneJob", "team", "a"),
            talk.client.ensure({"kind": "Job", "metadata": {"namespace": "team", "name": "a"}}, "uid"),
            talk.client.suspend("Job", "team", "a", "uid"),
        ):
            with pytest.raises(UnreadableAnswer, match="cannot be read"):
                await call

    talk(lambda request: body, act)


def test_an_object_without_a_uid_is_not_taken_for_one():
    async def act(talk: Talk) -> None:
        with pytest.raises(UnreadableAnswer, match="it has no uid"):
            await talk.client.get("FineTuneJob", "team", "a")

    talk(lambda request: b"{}", act)


@pytest.mark.parametrize("body", NO_LISTS)
def test_an_answer_that_is_no_list_neither_empties_the_cache_nor_looks_like_a_restored_etcd(body: bytes):
    async def act(talk: Talk) -> None:
        cache, restored = Cache(), list[None]()
        whole = relister(talk.client, cache, restored)
        bodies[:] = [listed(job("a"), job("b")), listed(), listed(), listed()]
        await whole.once()
        bodies[:] = [body]
        with pytest.raises(UnreadableAnswer):
            await whole.once()
        assert names(cache) == {"a", "b"}
        assert restored == []

    bodies: list[bytes] = []
    talk(lambda request: bodies.pop(0), act)


@pytest.mark.parametrize("levels", [230, 1_200, 9_000])
def test_an_object_that_nests_too_deep_is_read_in_part_and_the_others_whole(levels: int):
    deep = json.dumps(job("deep", resources={"affinity": "here"})).replace('"here"', "[" * levels + "]" * levels)
    page = listed(job("a"), "here", job("b")).replace(b'"here"', deep.encode())

    async def act(talk: Talk) -> None:
        cache = Cache()
        await relister(talk.client, cache, []).once()
        assert names(cache) == {"a", "b", "deep"}
        assert talk.unreadable == [("finetunejobs", 1)]
        found = await talk.client.get("FineTuneJob", "team", "deep")
        assert raw.text(found, "metadata", "name") == "deep"
        assert talk.unreadable == [("finetunejobs", 1)] * 2

    def answer(request: web.Request) -> bytes:
        if request.path.endswith("/deep"):
            return deep.encode()
        return page if request.path.endswith("finetunejobs") else listed()

    talk(answer, act)


def test_what_a_list_cannot_show_is_not_taken_for_deleted():
    async def act(talk: Talk) -> None:
        cache = Cache()
        whole = relister(talk.client, cache, [])
        bodies[:] = [listed(job("a"), job("b")), listed(), listed(), listed()]
        await whole.once()
        bodies[:] = [listed(job("a"), 7), listed(), listed(), listed()]
        await whole.once()
        assert names(cache) == {"a", "b"}
        assert talk.unreadable == [("finetunejobs", 1)]
        bodies[:] = [listed(job("a")), listed(), listed(), listed()]
        await whole.once()
        assert names(cache) == {"a"}

    bodies: list[bytes] = []
    talk(lambda request: bodies.pop(0), act)


def test_large_objects_are_listed_in_smaller_pages():
    names = [f"j{index}" for index in range(60)]
    limits: list[int] = []

    def answer(request: web.Request) -> bytes:
        start, limit = int(request.query.get("continue", 0)), int(request.query["limit"])
        limits.append(limit)
        end = start + limit
        token = str(end) if end < len(names) else ""
        return listed(*(job(name, text="x" * 200_000) for name in names[start:end]), token=token)

    async def act(talk: Talk) -> None:
        pages = [page async for page in talk.client.pages("FineTuneJob", "team")]
        assert [item["metadata"]["name"] for page in pages for item in page.items] == names
        assert max(len(page.items) for page in pages) <= 20
        assert [page.last for page in pages] == [False] * (len(pages) - 1) + [True]
        assert limits[0] == PAGE

    talk(answer, act)


def test_events_that_nest_too_deep_are_read_in_part_and_an_answer_that_is_no_watch_is_a_failed_connection():
    deep = json.dumps({"type": "ADDED", "object": job("deep", x="here")}).replace('"here"', "[" * 300 + "]" * 300)

    async def act(talk: Talk) -> None:
        found = [event async for event in talk.client.watch("/apis/finetune.dev/v1alpha1/finetunejobs", {}, 5)]
        assert [raw.text(event, "object", "metadata", "name") for event in found] == ["deep"]
        assert talk.unreadable == [("finetunejobs", 1)]
        body[:] = [HTML + b"\n"]
        with pytest.raises(UnreadableAnswer):
            async for _ in talk.client.watch("/apis/finetune.dev/v1alpha1/finetunejobs", {}, 5):
                pass

    body = [deep.encode() + b"\n"]
    talk(lambda request: body[0], act)


def check_bytes(noise: random.Random, rounds: int) -> None:
    """Damaged pages and objects, through everything that reads an answer: the expected errors, and no other."""

    def damaged(data: bytes) -> bytes:
        found = bytearray(data)
        for _ in range(noise.randint(0, 3)):
            place = noise.randrange(len(found))
            found[place : place + noise.choice([0, 1, 30])] = noise.choice(
                [b"", b'"', b"{", b"]", b"\xff", b'{"a":' * 300]
            )
            found = found or bytearray(b"7")
        return bytes(found)

    async def act(talk: Talk) -> None:
        cache = Cache()
        whole = relister(talk.client, cache, [])
        for _ in range(rounds):
            with suppress(ApiError, OSError, TimeoutError):
                await whole.once()
            with suppress(ApiError, OSError, TimeoutError):
                await talk.client.get("FineTuneJob", "team", "a")
            with suppress(ApiError, OSError, TimeoutError):
                async for _event in talk.client.watch("/api/v1/events", {}, 5):
                    pass
            for key in cache.keys():  # noqa: SIM118 -- no dict
                cache.snapshot(key)

    def answer(request: web.Request) -> bytes:
        if "watch" in request.query:
            return damaged(json.dumps({"type": "ADDED", "object": job("a")}).encode() + b"\n")
        if request.path.endswith("/a"):
            return damaged(json.dumps(job("a", x=nested(40))).encode())
        return damaged(listed(job("a", x=nested(150)), job("b")))

    talk(answer, act)


def test_damaged_answers_raise_nothing_but_what_is_retried():
    check_bytes(random.Random(14), 60)


@pytest.mark.nightly
def test_many_more_damaged_answers_raise_nothing_but_what_is_retried():
    check_bytes(random.Random(), 10_000)
