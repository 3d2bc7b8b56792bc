"""An attack on the administrator's rules, on a Kubernetes API: a user changes a lawful spec into an unlawful one
between the creation of its Job and the first write of its status, the last moment at which Kubernetes allows it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from finetune_api import constants
from support.node.node import ProcessNode
from support.operator.fixtures import Jobs, StartOperator, manifest
from support.operator.in_process import living
from support.server.client import MERGE, ApiError, AsyncKube, path_of
from support.server.fault_proxy import ApiProxy
from support.server.server import Cluster

Object = dict[str, Any]
#: What no rule lets through by default -> the rule that must say so.
ATTACKS: dict[str, tuple[Object, str]] = {
    "image": ({"image": "registry.example.com/evil/trainer:1"}, "policy.allowedImages"),
    "code": ({"model": {"revision": "a" * 40, "trustRemoteCode": True}}, "policy.allowRemoteCode"),
    "environ": ({"dataset": {"train": "file:///proc/self/environ"}}, "protected paths"),
}
Hook = Callable[[str], Awaitable[None]]


class _RacingProxy(ApiProxy):
    """Calls `hook` with the name of each Job, after the API server has made it and before the operator hears of it."""

    hook: Hook

    async def _forward(self, request: web.Request) -> aiohttp.ClientResponse:
        answer = await super()._forward(request)
        if request.method == "POST" and request.path.endswith("/jobs") and answer.status == 201:
            await self.hook((await request.json())["metadata"]["name"])
        return answer


async def _wait_for(what: Callable[[], Awaitable[Any]]) -> Any:
    for _ in range(600):
        if found := await what():
            return found
        await asyncio.sleep(0.05)
    raise AssertionError("not within 30 s")


async def _attack(cluster: Cluster, namespace: str) -> dict[str, tuple[Object, list[Object]]]:
    """Return, by attack, the Succeeded condition and every Job that was ever made."""
    made: list[Object] = []
    results: dict[str, tuple[Object, list[Object]]] = {}
    kube = AsyncKube(cluster.access)
    async with _RacingProxy(cluster.access) as proxy, AsyncExitStack() as stack:
        stack.push_async_callback(kube.close)

        async def change_the_spec(job: str) -> None:
            made.append(await kube.request("GET", path_of("Job", namespace, job)))
            attack, _, attempt = job.rpartition("-")
            if attempt == "1":
                where = path_of(constants.KIND, namespace, attack)
                await kube.request("PATCH", where, {"spec": ATTACKS[attack][0]}, None, MERGE)

        async def outcome(attack: str) -> Object | None:
            found = await kube.request("GET", path_of(constants.KIND, namespace, attack))
            conditions = found.get("status", {}).get("conditions", [])
            return next((c for c in conditions if c["type"] == "Succeeded" and c["status"] != "Unknown"), None)

        proxy.hook = change_the_spec
        async with living(proxy, namespace):
            for attack in ATTACKS:
                await kube.request("POST", path_of(constants.KIND, namespace), manifest(attack))
            for attack in ATTACKS:
                end = await _wait_for(lambda attack=attack: outcome(attack))
                results[attack] = end, [job for job in made if job["metadata"]["labels"][constants.LABEL_JOB] == attack]

            async def all_stopped() -> bool:
                return not (await kube.request("GET", path_of("Job", namespace)))["items"]

            await _wait_for(all_stopped)  # the attempts of the earlier specs
    return results


def test_a_spec_changed_between_its_job_and_its_status_is_refused_by_the_rules_name(cluster: Cluster, namespace: str):
    for attack, (end, made) in asyncio.run(_attack(cluster, namespace)).items():
        assert (end["status"], end["reason"]) == ("False", "PolicyRefused"), attack
        assert end["message"].endswith(f"(administrator's rule {ATTACKS[attack][1]})")
        assert [job["metadata"]["name"] for job in made] == [f"{attack}-1"], "no second attempt"
        pod = made[0]["spec"]["template"]
        assert "evil" not in pod["spec"]["containers"][0]["image"]
        assert "/proc" not in pod["metadata"]["annotations"][constants.ANNOTATION_MANIFEST]


def test_a_wrong_image_is_mended_in_place_and_the_rules_are_asked_for_the_new_one(
    start_operator: StartOperator, node: ProcessNode, jobs: Jobs
):
    typo, right = "registry.example.com/team/trainer:tpyo", "registry.example.com/team/trainer:1"
    start_operator(allowed_images=["registry.example.com/team/*"])
    node.simulate_pull_error(typo)
    for name in ("nli", "other"):
        jobs.create(name, image=typo)
    for name in ("nli", "other"):
        jobs.wait(name, "Scheduled", "False", "ImagePullBackOff")
    jobs.change("nli", image=right)
    jobs.change("other", image="registry.example.com/evil/trainer:1")
    assert jobs.wait_over("nli")["status"] == "True"
    assert jobs.reasons("nli") == ["SpecChanged", "Succeeded"]
    with pytest.raises(ApiError, match=r"spec\.image.* cannot change once the job has run or ended"):
        jobs.change("nli", image=typo)
    assert jobs.wait_over("other")["message"].endswith("(administrator's rule policy.allowedImages)")
    assert jobs.reasons("other") == ["SpecChanged"]
