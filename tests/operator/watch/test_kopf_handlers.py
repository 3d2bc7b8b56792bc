"""What Kopf's session shows it, and tells us."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

import aiohttp
import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from finetune_operator.kube.session import Connection
from finetune_operator.observability.metrics import Metrics
from finetune_operator.watch.cache import Cache
from finetune_operator.watch.kopf_handlers import kopf_login


@asynccontextmanager
async def connected(answer: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[Connection]:
    """A connection to an API server that gives `answer` to every GET."""
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        configuration = Configuration()
        configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield Connection(configuration, Metrics().api_call)
    finally:
        await runner.cleanup()


def test_kopf_is_told_of_its_lists_only_what_is_new_and_we_are_told_that_it_lists():
    items = [{"metadata": {"name": name, "namespace": "team", "uid": name, "resourceVersion": "7"}} for name in "ab"]
    heard: list[tuple[str, str]] = []

    async def act() -> None:
        async def answer(request: web.Request) -> web.Response:
            return web.json_response({"items": items, "metadata": {"resourceVersion": "9"}})

        async with connected(answer) as connection:
            cache = Cache()
            cache.put("FineTuneJob", items[0])
            connection.is_known = lambda resource, obj: (
                resource == "finetunejobs" and cache.is_known("FineTuneJob", obj)
            )
            path = f"{connection.configuration.host}/apis/finetune.dev/v1alpha1/namespaces/team/finetunejobs?limit=100"
            login = kopf_login(connection, lambda resource, namespace: heard.append((resource, namespace)))
            async with login.aiohttp_session as kopfs, connection.session() as ours:
                found = await (await kopfs.get(path)).json()
                await (await kopfs.get(f"{path}&continue=x")).read()
                await (await ours.get(path)).read()
            assert [obj["metadata"]["name"] for obj in found["items"]] == ["b"]
            assert found["metadata"] == {"resourceVersion": "9"}
            assert heard == [("finetunejobs", "team")], "a list is heard of once, and ours is not Kopf's"

    asyncio.run(act())


def test_what_kopf_cannot_read_is_cut_or_a_failed_connection_and_requests_carry_our_name():
    """A page of a sign-in proxy, and an object that nests deeper than Python's parser goes."""
    deep = json.dumps({"metadata": {"name": "deep"}, "spec": "here"}).replace('"here"', "[" * 1500 + "]" * 1500)
    bodies = {
        "/html": "<!DOCTYPE html>",
        "/list": f'{{"metadata":{{"resourceVersion":"9"}},"items":[{{"metadata":{{"name":"a"}}}},{deep}]}}',
        "/deep": deep,
    }
    agents: set[str] = set()
    unreadable: list[tuple[str, int]] = []

    async def act() -> None:
        async def answer(request: web.Request) -> web.Response:
            agents.add(request.headers["User-Agent"])
            return web.Response(text=bodies[request.path[len("/apis/finetune.dev/v1alpha1") :]])

        async with connected(answer) as connection:
            connection.on_unreadable = lambda resource, count: unreadable.append((resource, count))
            root = f"{connection.configuration.host}/apis/finetune.dev/v1alpha1"
            async with kopf_login(connection, lambda resource, namespace: None).aiohttp_session as kopfs:
                found = await (await kopfs.get(f"{root}/list")).json()
                assert [item["metadata"]["name"] for item in found["items"]] == ["a", "deep"]
                json.dumps(found)
                assert (await (await kopfs.get(f"{root}/deep")).json())["metadata"] == {"name": "deep"}
                with pytest.raises(aiohttp.ClientConnectionError, match="cannot be read"):
                    await (await kopfs.get(f"{root}/html")).json()

    asyncio.run(act())
    assert unreadable == [("list", 1)]
    assert agents == {f"finetune-operator/{version('finetune-operator')}"}
