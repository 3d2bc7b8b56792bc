"""What answers is no API server, or one that lies: every command ends with a sentence, and none with a traceback."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from finetune_api import constants
from finetune_cli.errors import CliError
from finetune_cli.kube import reading
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
def answering() -> Iterator[Callable[..., Cluster]]:
    """Return a cluster that gives one answer to everything."""
    body, status = b"", 200

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

        do_DELETE = do_GET  # noqa: N815
        do_PATCH = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"

    def cluster(answer: Any, code: int = 200) -> Cluster:
        nonlocal body, status
        status = code
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n"
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


@pytest.mark.parametrize(
    "line", [*({"type": "ADDED", "object": each} for each in STRANGE), {}, [], "x", {"type": []}, {"type": "ERROR"}]
)
def test_a_line_of_a_watch_that_is_no_event_is_told(answering: Callable[[Any], Cluster], line: Any) -> None:
    with pytest.raises(CliError, match="cannot be read: "):
        next(answering(line)._watch("x", "1", 1, constants.KIND))


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


@pytest.mark.parametrize("status", [200, 404, 500])
@pytest.mark.parametrize("ask", ["get", "jobs", "apply", "patch", "delete", "pods", "watch"])
def test_an_answer_without_an_end_is_not_kept(
    answering: Callable[..., Cluster], ask: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_OBJECT", 1 << 20)
    monkeypatch.setattr(reading, "MAX_LIST", 1 << 20)
    cluster = answering(b'{"kind": "' + b"x" * (2 << 20), status)
    asked: dict[str, Callable[[], Any]] = {
        "get": lambda: cluster.get("x"),
        "jobs": cluster.jobs,
        "apply": lambda: cluster.apply(JOB),
        "patch": lambda: cluster.patch("x", {}),
        "delete": lambda: cluster.delete("x"),
        "pods": lambda: cluster.pods("x"),
        "watch": lambda: next(cluster._watch("x", "1", 1, constants.KIND)),
    }
    says = "cannot be read" if (ask, status) == ("watch", 200) else "cannot be read: it has more than 1 MiB"
    with pytest.raises(CliError, match=says):
        asked[ask]()


def test_a_server_that_has_forgotten_even_the_present_is_not_asked_at_once_again(
    answering: Callable[..., Cluster],
) -> None:
    gone = {"kind": "Status", "code": 410, "reason": "Expired"}
    for cluster in (answering({"type": "ERROR", "object": gone}), answering(gone, 410)):
        with pytest.raises(CliError, match="answered 410") as told:
            list(cluster._watch("x", "1", 1, constants.KIND))
        assert told.value.may_pass
