"""Where the hub's token goes when the hub sends a reader elsewhere."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finetune_api import uri
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.hub import fetch_from_hub
from support.stores.hub import Hub


@contextmanager
def _cdn(body: bytes) -> Iterator[tuple[str, list[str | None]]]:
    """Yield the address of a server of files, and the Authorization headers that it was sent."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://localhost:{running.server_address[1]}", seen
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def test_a_file_server_on_another_host_never_sees_the_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "config.json").write_bytes(b'{"a": 1}')
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add("me/model", repository, token="hf_secret")
    credentials = Credentials.for_role("model", secrets_dir=tmp_path / "secrets")
    with _cdn(b'{"a": 1}') as (address, seen):
        hub.cdn = address
        folder = fetch_from_hub(uri.parse("hf://me/model"), credentials, tmp_path / "cache")
    assert (folder / "config.json").read_bytes() == b'{"a": 1}'
    assert seen, "the file came from the other host"
    assert set(seen) == {None}
