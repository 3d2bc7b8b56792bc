"""The kubelet's log endpoint, so that `kubectl logs` and every client of pods/log work against a process node.

The API server finds it through the Node object's address and port, and fetches /containerLogs/<ns>/<pod>/<container>.
"""

import asyncio
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

Object = dict[str, Any]
#: find(namespace, pod, container) -> the log file and whether the container still runs; None when there is none
Find = Callable[[str, str, str], tuple[Path, Callable[[], bool]] | None]

_POLL_SECONDS = 0.1


def node_object(name: str) -> Object:
    labels = {"kubernetes.io/hostname": name}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}


def node_status(port: int) -> Object:
    """What the API server needs to reach the kubelet."""
    addresses = [{"type": "InternalIP", "address": "127.0.0.1"}]
    return {"status": {"addresses": addresses, "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}}


async def serve(folder: Path, find: Find) -> tuple[web.AppRunner, int]:
    """Serve logs over TLS (self-signed, as kubelets do by default); the runner to clean up, and the port."""

    async def container_logs(request: web.Request) -> web.StreamResponse:
        place = request.match_info
        found = find(place["namespace"], place["pod"], place["container"])
        if found is None:
            return web.Response(
                status=404, text=f"container {place['container']} of pod {place['pod']} has no log here\n"
            )
        return await _send(request, *found)

    app = web.Application()
    app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", container_logs)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=_tls(folder))
    await site.start()
    return runner, int(runner.addresses[0][1])


async def _send(request: web.Request, log: Path, is_running: Callable[[], bool]) -> web.StreamResponse:
    content = _read(log, 0)
    sent = len(content)
    tail = request.query.get("tailLines")
    if tail is not None:
        lines = content.splitlines(keepends=True)
        content = b"".join(lines[-int(tail) :] if int(tail) else [])
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    await response.prepare(request)
    await response.write(content)
    while request.query.get("follow") == "true":
        last_look = not is_running()
        more = _read(log, sent)
        sent += len(more)
        if more:
            await response.write(more)
        if last_look:
            break
        await asyncio.sleep(_POLL_SECONDS)
    await response.write_eof()
    return response


def _read(log: Path, start: int) -> bytes:
    if not log.exists():
        return b""
    with log.open("rb") as file:
        file.seek(start)
        return file.read()


def _tls(folder: Path) -> ssl.SSLContext:
    key, certificate = folder / "kubelet.key", folder / "kubelet.crt"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=process-node"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context
