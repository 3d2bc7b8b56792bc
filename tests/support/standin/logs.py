"""GET pods/<name>/log: fetched from the kubelet of the pod's node, as the API server does."""

import aiohttp
from aiohttp import web

from support.standin.store import Refusal, Store


async def forward_log(request: web.Request, store: Store, namespace: str, name: str) -> web.StreamResponse:
    """Stream the container's log to the client. Refuses a pod that is on no node, or has several containers."""
    pod = store.get(store.resource("", "v1", "pods"), namespace, name)
    containers = [container["name"] for container in pod["spec"]["containers"]]
    container = request.query.get("container") or (containers[0] if len(containers) == 1 else "")
    if container not in containers:
        text = f"a container name must be specified for pod {name}, choose one of: {containers}"
        raise Refusal(400, "BadRequest", text)
    if not pod["spec"].get("nodeName"):
        text = f'container "{container}" in pod "{name}" is waiting to start: ContainerCreating'
        raise Refusal(400, "BadRequest", text)
    node = store.get(store.resource("", "v1", "nodes"), "", pod["spec"]["nodeName"])
    port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"]
    url = f"https://{node['status']['addresses'][0]['address']}:{port}/containerLogs/{namespace}/{name}/{container}"
    query = {key: value for key, value in request.query.items() if key in ("follow", "tailLines")}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession() as session, session.get(url, params=query, ssl=False, timeout=timeout) as answer:
        if answer.status != 200:
            raise Refusal(answer.status, "NotFound", (await answer.text()).strip())
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response
