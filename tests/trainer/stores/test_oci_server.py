"""Logins, redirects, TLS and deletion: on a small server of ours, some on Docker's registry where it is installed."""

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import urllib3

from finetune_trainer import redact
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import StoreAccessDenied, StoreMisconfigured, StoreNotFound, StoreUnavailable
from finetune_trainer.stores.oci import credentials as registry_settings
from finetune_trainer.stores.oci.client import RegistryClient
from finetune_trainer.stores.oci.tokens import authorization
from support.stores.bundles import output
from support.stores.images import FILES, bundle, open_image
from support.stores.registry import BINARY, LOGIN, PASSWORD, Registry, docker_registry, registry, standin_registry
from support.stores.tokens import SERVICE, Authority, Tokens, token_server

__all__ = ["registry"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.new()


@pytest.fixture
def standin() -> Iterator[Registry]:
    with standin_registry() as found:
        yield found


@pytest.fixture
def tokens(authority: Authority) -> Iterator[Tokens]:
    with token_server(LOGIN, authority) as found:
        yield found


@pytest.fixture(params=["small server", "Docker's registry"])
def with_tokens(request: pytest.FixtureRequest, tokens: Tokens, tmp_path: Path) -> Iterator[Registry]:
    """A registry that sends its users to `tokens`."""
    if request.param == "small server":
        with standin_registry() as found:
            found.tokens = tokens
            yield found
        return
    if not BINARY:
        pytest.skip("no registry is installed: apt install docker-registry")
    with docker_registry(tmp_path, tokens) as found:
        yield found


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that does not answer is not asked again."""
    monkeypatch.setenv("FINETUNE_STORE_PATIENCE", "0")


def test_where_a_registry_wants_tokens_they_are_fetched_elsewhere_with_the_login(
    with_tokens: Registry, tokens: Tokens, tmp_path: Path
) -> None:
    store = open_image(with_tokens, "team/nli:v1", tmp_path)
    output(store).publish(bundle(tmp_path / "adapter"))
    assert store.read_bytes("empty.txt") == b""
    store.download(WEIGHTS, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == FILES[WEIGHTS]
    assert {login for _, login in tokens.asked} == {LOGIN}
    assert {query["service"][0] for query, _ in tokens.asked} == {SERVICE}
    assert all(query["scope"][0].startswith("repository:team/nli:") for query, _ in tokens.asked)


def test_the_password_goes_to_the_server_for_tokens_alone(standin: Registry, tokens: Tokens, tmp_path: Path) -> None:
    standin.tokens = tokens
    output(open_image(standin, "team/nli:v1", tmp_path)).publish(bundle(tmp_path / "adapter"))
    assert not [each for each in tokens.used if PASSWORD in each or "Basic" in each]
    with pytest.raises(StoreAccessDenied, match=r"access to read is denied \(HTTP 401\): check the registry's user"):
        output(open_image(standin, "team/nli:v1", tmp_path, password="wrong")).find_published()


@pytest.mark.parametrize("uses", [1, 2, 3, 5])
def test_a_token_that_expires_in_the_middle_of_a_push_is_renewed(
    standin: Registry, tokens: Tokens, tmp_path: Path, uses: int
) -> None:
    """With `uses` of one, the PUT of every blob is denied once all of it was sent, and sent again."""
    standin.tokens, tokens.uses = tokens, uses
    store = open_image(standin, "team/nli:v1", tmp_path)
    output(store).publish(bundle(tmp_path / "adapter"))
    assert len(tokens.asked) > 10 / uses
    assert b"".join(store.stream(WEIGHTS)) == FILES[WEIGHTS]


@pytest.mark.parametrize(
    ("challenge", "sentence"),
    [
        ('Bearer realm="http://127.0.0.1:9/token"', "the registry does not answer"),
        ('Bearer realm="file:///etc/passwd"', "an address that is no http:// or https:// URL is not allowed here"),
        (
            'Bearer realm="http://elsewhere.test/token"',
            "own server for tokens: http://elsewhere.test is not allowed here",
        ),
        ("Bearer nothing", "access to read is denied"),
        ('Digest realm="x"', "access to read is denied"),
    ],
)
@pytest.mark.usefixtures("once")
def test_a_challenge_that_cannot_be_met_is_told(
    challenge: str, sentence: str, standin: Registry, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokens, "challenge", challenge)
    monkeypatch.setenv("FINETUNE_ALLOWED_ENDPOINTS", f"http://{standin.address},http://127.0.0.1:9")
    standin.tokens = tokens
    with pytest.raises((StoreUnavailable, StoreAccessDenied, StoreMisconfigured), match=sentence):
        open_image(standin, "team/nli:v1", tmp_path).list()
    assert tokens.asked == []


@pytest.mark.parametrize(
    "answer", [[], None, {"token": 5}, {"token": {"a": 1}}, {"token": "secret\r\nX: y"}, {"token": "€"}]
)
def test_a_token_that_no_header_can_carry_is_none_and_is_not_shown(answer: object) -> None:
    class Pool:
        def request(self, *_: object, **__: object) -> urllib3.HTTPResponse:
            return urllib3.HTTPResponse(BytesIO(json.dumps(answer).encode()), preload_content=False, status=200)

    challenge: Any = 'Bearer realm="https://tokens.test/"', ("user", PASSWORD), Pool(), "oci: here"
    with pytest.raises(StoreUnavailable, match=r"^oci: here: the registry's server for tokens gives none$"):
        authorization(*challenge, is_secure=True)


@pytest.mark.usefixtures("once")
def test_an_answer_that_breaks_off_is_no_image_of_another_kind(standin: Registry, tmp_path: Path) -> None:
    """The next try may have all of it, so it must not end the job for good."""
    output(open_image(standin, "team/nli:v1", tmp_path)).publish(bundle(tmp_path / "adapter"))
    standin.faults.append(("GET", "/manifests/", 0))
    store = open_image(standin, "team/nli:v1", tmp_path)
    with pytest.raises(StoreUnavailable, match="the registry does not answer"):
        store.list()
    assert len(store.list()) == len(FILES) + 1


@pytest.mark.parametrize(
    ("scheme", "asked"),
    [("http", "GET http://registry.test/v2/team/nli/manifests/v1"), ("https", "CONNECT registry.test:443")],
)
@pytest.mark.usefixtures("once")
def test_a_registry_is_reached_through_the_proxy_that_the_environment_names(
    scheme: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str | None]] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((f"{self.command} {self.path}", self.headers.get("Proxy-Authorization")))
            self.send_error(404)

        do_HEAD = do_CONNECT = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    values = {"REGISTRY_PLAIN_HTTP": str(scheme == "http").lower()}

    def read() -> None:
        client = RegistryClient("registry.test", "team/nli", Credentials("oci", values), "oci")
        client.ask("GET", "manifests/v1")

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://me:p%40ss@127.0.0.1:{server.server_address[1]}")
        with pytest.raises(StoreNotFound if scheme == "http" else StoreUnavailable) as refused:
            read()
        assert scheme == "http" or "the proxy does not lead there: check HTTPS_PROXY" in str(refused.value)
        assert seen == [(asked, f"Basic {base64.b64encode(b'me:p@ss').decode()}")]
        monkeypatch.setenv("NO_PROXY", ".test")
        with pytest.raises(StoreUnavailable, match="the registry does not answer"):
            read()
        assert len(seen) == 1, "NO_PROXY names the registry"
        server.shutdown()


def elsewhere(standin: Registry) -> str:
    """The stand-in at another address, as blobs' storage."""
    return f"http://localhost:{standin.address.rpartition(':')[2]}"


def test_blobs_that_are_kept_elsewhere_are_fetched_there_without_the_login(standin: Registry, tmp_path: Path) -> None:
    standin.storage = elsewhere(standin)
    store = open_image(standin, "team/nli:v1", tmp_path)
    output(store).publish(bundle(tmp_path / "adapter"))
    assert b"".join(store.stream(WEIGHTS, 7)) == FILES[WEIGHTS][7:]
    assert standin.stored
    assert not [each for each in standin.stored if each.get("Authorization") or LOGIN in str(each)]


@pytest.mark.usefixtures("once")
def test_where_blobs_are_kept_must_be_allowed_too(
    standin: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_image(standin, "team/nli:v1", tmp_path)
    output(store).publish(bundle(tmp_path / "adapter"))
    standin.storage = elsewhere(standin)
    monkeypatch.setenv("FINETUNE_ALLOWED_ENDPOINTS", f"http://{standin.address}")
    with pytest.raises(
        StoreMisconfigured,
        match=r"keeps this elsewhere: http://localhost:\d+ is not allowed here; .*policy\.allowedHubEndpoints",
    ):
        store.download(WEIGHTS, tmp_path / "back")
    assert standin.stored == []
    monkeypatch.setenv("FINETUNE_ALLOWED_ENDPOINTS", f"http://{standin.address},http://localhost:*")
    store.download(WEIGHTS, tmp_path / "back")


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.usefixtures("once")
def test_what_is_pushed_follows_no_redirect(method: str, standin: Registry, tmp_path: Path) -> None:
    standin.faults.append((method, "/blobs/uploads/", 307))
    with pytest.raises(
        StoreMisconfigured,
        match=rf"the registry answers {method} with a redirect to http://elsewhere\.test: what is pushed",
    ):
        output(open_image(standin, "team/nli:v1", tmp_path)).publish(bundle(tmp_path / "adapter"))


def test_a_blob_that_breaks_off_is_read_on_from_there(
    standin: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.stores.oci.client._PAUSE", 0)
    store = open_image(standin, "team/nli:v1", tmp_path)
    output(store).publish(bundle(tmp_path / "adapter"))
    standin.ranges.clear()
    standin.faults += [("GET", "/blobs/", 0), ("GET", "/blobs/", 503), ("GET", "/blobs/", 0)]
    store.download(WEIGHTS, tmp_path / "back", sha256=hashlib.sha256(FILES[WEIGHTS]).hexdigest())
    starts = [int((each or "").removeprefix("bytes=").partition("-")[0]) for each in standin.ranges]
    assert len(starts) == 3
    assert starts == sorted(set(starts))
    standin.faults += [("GET", "/blobs/", 503)] * 9
    with pytest.raises(StoreUnavailable, match=r"the registry keeps failing \(HTTP 503"):
        store.download(WEIGHTS, tmp_path / "again")
    assert len(standin.faults) == 5


def test_an_image_that_is_replaced_leaves_other_tags_of_it_alone(registry: Registry, tmp_path: Path) -> None:
    """Also the tag itself stays, on a registry that deletes no tags, until the new image is whole."""
    output(open_image(registry, "team/kept:v1", tmp_path)).publish(bundle(tmp_path / "adapter"))
    first = open_image(registry, "team/kept:v1", tmp_path)
    renamed(registry, "team/kept", "v1", "stable")
    output(first, uid="2", overwrite=True).publish(bundle(tmp_path / "adapter"))
    stable = open_image(registry, "team/kept:stable", tmp_path)
    assert b"".join(stable.stream(WEIGHTS)) == FILES[WEIGHTS]
    assert stable.read_bytes("manifest.json") != first.read_bytes("manifest.json")


def renamed(registry: Registry, name: str, old: str, new: str) -> None:
    kind = "application/vnd.oci.image.index.v1+json"
    url = f"http://{registry.address}/v2/{name}/manifests"
    found = urllib3.request("GET", f"{url}/{old}", headers={"Authorization": LOGIN, "Accept": kind})
    made = urllib3.request(
        "PUT", f"{url}/{new}", headers={"Authorization": LOGIN, "Content-Type": kind}, body=found.data
    )
    assert made.status == 201


@pytest.mark.parametrize("deletes_tags", [True, False])
def test_a_tag_is_deleted_or_said_to_stay(
    deletes_tags: bool, standin: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    standin.deletes_tags = deletes_tags
    store = open_image(standin, "team/nli:v1", tmp_path)
    output(store).publish(bundle(tmp_path / "adapter"))
    renamed(standin, "team/nli", "v1", "stable")
    store.delete("manifest.json")
    assert store.exists("manifest.json") != deletes_tags
    assert (
        "stays until another image takes its tag: the registry deletes no tag (HTTP 405)" in caplog.text
    ) != deletes_tags
    assert open_image(standin, "team/nli:stable", tmp_path).exists("manifest.json")
    standin.deletes_tags = True
    store.delete("manifest.json")
    store.delete("manifest.json")  # it is gone: nothing to say


@pytest.fixture
def private(authority: Authority, tmp_path: Path) -> Iterator[Registry]:
    """With TLS, of a certificate that nobody trusts unasked."""
    with standin_registry(authority.write(tmp_path)) as found:
        yield found


@pytest.mark.usefixtures("once")
def test_a_private_authority_is_trusted_where_the_secret_has_its_certificate(private: Registry, tmp_path: Path) -> None:
    keys = {"REGISTRY_PLAIN_HTTP": "false"}
    with pytest.raises(
        StoreUnavailable,
        match=r"the TLS connection failed \(set REGISTRY_CA_BUNDLE for a private certificate authority",
    ):
        open_image(private, "team/nli:v1", tmp_path, **keys).list()
    store = open_image(private, "team/nli:v1", tmp_path, **keys, REGISTRY_CA_BUNDLE=str(tmp_path / "ca.crt"))
    output(store).publish(bundle(tmp_path / "adapter"))
    assert b"".join(store.stream(WEIGHTS)) == FILES[WEIGHTS]
    private.storage = "http://localhost:9"
    with pytest.raises(StoreMisconfigured, match="the registry leads from https to http://localhost:9"):
        store.download(WEIGHTS, tmp_path / "back")


@pytest.mark.usefixtures("once")
def test_a_registry_without_tls_needs_the_setting(standin: Registry, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="REGISTRY_PLAIN_HTTP=true for a registry without TLS"):
        open_image(standin, "team/nli:v1", tmp_path, REGISTRY_PLAIN_HTTP="false").list()
    assert redact.redacted("it is false") == "it is false"
    assert open_image(standin, "team/nli:v1", tmp_path, REGISTRY_PLAIN_HTTP="True").list() == []


@pytest.mark.parametrize(
    ("registry_name", "value", "scheme"),
    [
        ("registry.internal:5000", None, "https"),
        ("registry.internal:5000", "true", "http"),
        ("registry.internal", "false", "https"),
        ("localhost:5000", None, "http"),
        ("[::1]:5000", None, "http"),
        ("127.0.0.1.evil.test", None, "https"),
        ("localhost.evil.test", None, "https"),
    ],
)
def test_a_registry_is_spoken_to_with_tls_unless_it_is_here_or_the_setting_says_so(
    registry_name: str, value: str | None, scheme: str
) -> None:
    keys = {"REGISTRY_PLAIN_HTTP": value} if value else {}
    assert registry_settings.scheme(registry_name, Credentials("oci", keys), "output.oci.uri") == scheme


def test_a_file_of_certificates_that_is_not_there_is_named(standin: Registry, tmp_path: Path) -> None:
    with pytest.raises(StoreMisconfigured, match=f"REGISTRY_CA_BUNDLE must be .*: {tmp_path}/ca.crt does not exist"):
        open_image(standin, "team/nli:v1", tmp_path, REGISTRY_CA_BUNDLE=str(tmp_path / "ca.crt"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("REGISTRY_PLAIN_HTTP", "yes"),
        ("REGISTRY_CA_BUNDLE", "/nowhere/CANARY"),
        ("REGISTRY_CA_BUNDLE", os.devnull),
        ("REGISTRY_CA_BUNDLE", "/tmp"),
        ("REGISTRY_CA_BUNDLE", __file__),
    ],
)
def test_a_wrong_setting_is_named_and_its_value_is_not(key: str, value: str, standin: Registry, tmp_path: Path) -> None:
    with pytest.raises(StoreMisconfigured, match=rf"^output\.oci\.uri: {key} must be ") as refused:
        open_image(standin, "team/nli:v1", tmp_path, **{key: value})
    assert "CANARY" not in str(refused.value)
    assert "output.oci.secretRef" in str(refused.value)
