"""What answers is no API server, or one that lies: every command ends with a sentence, and none with a traceback."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from finetune_cli.errors import CliError
from finetune_cli.kube.client import Cluster
from finetune_cli.kube.errors import explained

JOB: dict[str, Any] = {"metadata": {"name": "x", "namespace": "team", "resourceVersion": "1"}, "spec": {}}
STRANGE = [
    {},
    {"metadata": None},
    {"metadata": []},
    JOB | {"spec": "x"},
    JOB | {"status": [1]},
    {"metadata": JOB["metadata"] | {"creationTimestamp": "yesterday"}},
    {"metadata": {"name": "x"}},
]


@pytest.fixture
def answering() -> Iterator[Callable[[Any], Cluster]]:
    """Return a cluster that gives one answer to everything."""
    body = b""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PATCH = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"

    def cluster(answer: Any) -> Cluster:
        nonlocal body
        body = json.dumps(answer).encode() + b"\n"
        return Cluster(client.ApiClient(client.Configuration(host=address)), "team", address)

    yield cluster
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("answer", STRANGE)
def test_an_object_that_is_none_is_told(answering: Callable[[Any], Cluster], answer: Any) -> None:
    cluster = answering(answer)
    for ask in (lambda: cluster.get("x"), lambda: cluster.patch("x", {}), lambda: cluster.apply(JOB), cluster.jobs):
        with pytest.raises(CliError, match="cannot be read: "):
            ask()
    with pytest.raises(CliError, match="cannot be read: no list of objects"):
        cluster.pods("x")


@pytest.mark.parametrize("line", [*({"type": "ADDED", "object": each} for each in STRANGE), {}, [], "x", {"type": []}])
def test_a_line_of_a_watch_that_is_no_event_is_told(answering: Callable[[Any], Cluster], line: Any) -> None:
    with pytest.raises(CliError, match="cannot be read: "):
        next(answering(line)._watch("x", "1", 1))


@pytest.mark.parametrize("answer", STRANGE)
def test_one_of_them_in_a_list_costs_no_other(answering: Callable[[Any], Cluster], answer: Any) -> None:
    found = answering({"metadata": {}, "items": [answer, JOB]}).jobs()
    assert (found.items, found.lost) == ([JOB], 1)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"details": "x"}',
        b'{"details": {"causes": "x"}}',
        b'{"details": {"causes": [null, 5]}}',
        b'{"message": []}',
        b"\xff",
    ],
)
@pytest.mark.parametrize("status", [400, 403, 404, 409, 422, 500])
def test_a_refusal_of_another_form_is_told(status: int, body: bytes) -> None:
    error = ApiException(status=status, reason="why")
    error.body = body
    with pytest.raises(CliError), explained("http://server", "team", "x"):
        raise error
