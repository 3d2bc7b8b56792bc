"""Reading one file from the hub: what a redirect is followed with."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetune_api import uri
from finetune_cli import hub
from finetune_cli.errors import CliError

SOURCE = uri.parse("hf://me/model/sub")


@contextmanager
def server(redirect: str = "") -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Its address and the (path, token) of what it was asked; sends everyone to `redirect`, or answers "body"."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            elsewhere = redirect and not self.path.startswith("/cache")
            self.send_response(307 if elsewhere else 200)
            self.send_header("Location", redirect)
            self.end_headers()
            self.wfile.write(b"" if elsewhere else b"body")

        def log_message(self, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}", asked
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


@pytest.fixture
def read(monkeypatch):
    def run(endpoint: str) -> bytes:
        monkeypatch.setenv("HF_ENDPOINT", endpoint + "/")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        return hub.read(SOURCE, "v1/beta", "config.json")

    return run


def test_a_redirect_within_the_hub_keeps_the_token(read):
    with server("/cache/config.json") as (endpoint, asked):
        assert read(endpoint) == b"body"
    token = "Bearer hf_secret"
    assert asked == [("/me/model/resolve/v1%2Fbeta/sub/config.json", token), ("/cache/config.json", token)]


def test_another_host_never_sees_the_token(read):
    with server() as (cdn, asked), server(f"{cdn}/config.json") as (endpoint, _):
        assert read(endpoint) == b"body"
    assert asked == [("/config.json", None)]


def test_an_endless_redirect_is_a_sentence(read):
    with server("/again") as (endpoint, _), pytest.raises(CliError, match="the hub answered HTTP 307"):
        read(endpoint)
