"""Where the hub's token goes when the hub sends a reader elsewhere."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from finetune_api import constants, uri
from finetune_trainer.stores import hub_answers, patience
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import StoreMisconfigured, StoreUnavailable
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
        seen.clear()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
        monkeypatch.setenv(constants.ENV_ALLOWED_ENDPOINTS, hub.endpoint)
        with pytest.raises(StoreMisconfigured) as refused:
            fetch_from_hub(uri.parse("hf://me/model"), credentials, tmp_path / "ruled")
        assert str(refused.value) == (
            f"model.source: hf://me/model at {hub.endpoint}: the hub keeps this elsewhere: {address} is not allowed"
            f" here; allowed: {hub.endpoint} (administrator's rule policy.allowedHubEndpoints)"
        )
        assert not seen, "the other host was asked"
        assert huggingface_hub.constants.HF_HUB_DISABLE_XET, "Xet's client would ask whom it likes"
        monkeypatch.setenv(constants.ENV_ALLOWED_ENDPOINTS, f"{hub.endpoint},http://localhost:*")
        fetch_from_hub(uri.parse("hf://me/model"), credentials, tmp_path / "ruled")
        assert seen


def test_a_hub_that_does_not_answer_is_told_of_while_one_waits_and_left_after_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, seconds in ((patience, "SILENT_SECONDS", 0.01), (hub_answers, "ANSWER_SECONDS", 0.1)):
        monkeypatch.setattr(module, name, seconds)
    told: list[str] = []
    token = patience.TELL.set(told.append)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(StoreUnavailable, match="the hub does not answer"):
            fetch_from_hub(
                uri.parse("hf://me/model"), Credentials("model", {"HF_ENDPOINT": endpoint}), tmp_path, attempts=1
            )
    patience.TELL.reset(token)
    assert told == [f"Waiting for the hub at {endpoint} to answer: it is tried for 15 seconds"]


def test_an_endpoint_in_a_secret_that_the_administrator_does_not_allow_is_asked_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(constants.ENV_ALLOWED_ENDPOINTS, "https://huggingface.co,https://*.internal")
    secret = tmp_path / "secrets" / "model"
    secret.mkdir(parents=True)
    with _cdn(b"{}") as (address, seen):
        for trick in (address, f"{address}/x.internal", f"{address}#.internal", address.replace("//", "//a.internal@")):
            (secret / "HF_ENDPOINT").write_text(trick)
            (secret / constants.ENV_ALLOWED_ENDPOINTS).write_text("*")
            credentials = Credentials.for_role("model", secrets_dir=tmp_path / "secrets")
            with pytest.raises(StoreMisconfigured) as refused:
                fetch_from_hub(uri.parse("hf://me/model"), credentials, tmp_path / "cache")
            assert str(refused.value) == (
                f"model.source: hf://me/model: HF_ENDPOINT {address} is not allowed here; allowed: "
                "https://huggingface.co,https://*.internal (administrator's rule policy.allowedHubEndpoints)"
            )
        assert seen == []


def test_the_hub_itself_needs_to_be_allowed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(constants.ENV_ALLOWED_ENDPOINTS, "https://hub.internal")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://huggingface.co")
    with pytest.raises(StoreMisconfigured, match=r"https://huggingface\.co is not allowed here"):
        fetch_from_hub(uri.parse("hf://me/model"), Credentials("model", {}), tmp_path / "cache")


def test_a_file_of_certificates_that_is_not_there_is_named_with_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
    huggingface_hub.close_session()  # which has read its certificates
    with pytest.raises(StoreMisconfigured, match="SSL_CERT_FILE must be the path of a file with certificates in PEM: "):
        fetch_from_hub(
            uri.parse("hf://me/model"), Credentials("model", {"HF_ENDPOINT": "https://127.0.0.1:9"}), tmp_path
        )
