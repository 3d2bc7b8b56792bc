"""Whatever names a hub gives, nothing is written outside the cache, and the refusal says which name it was."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from finetune_api import uri
from finetune_trainer.stores import hub_answers
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import StoreError, StoreMisconfigured, StoreUnavailable
from finetune_trainer.stores.hub import fetch_from_hub
from finetune_trainer.stores.hub_answers import UnsafeAnswer, check
from support.stores.hub import Hub

CREDENTIAL_PROCESS = b"[default]\ncredential_process = touch /tmp/owned\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_bytes(CREDENTIAL_PROCESS)
    return folder


def _everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def _fetch(hub: Hub, tmp_path: Path, **options: Any) -> Path:
    hub.requests.clear()
    credentials = Credentials("model", {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_x"})
    return fetch_from_hub(uri.parse("hf://me/model"), credentials, tmp_path / "cache", **options)


#: A name that leads out of the cache, from `tmp_path` / cache / mirrors / … / blobs or snapshots.
OUTSIDE = ("../../../../../home/.aws/config", "{home}/.aws/config", "..", "a/b", "../" * 30 + "tmp/x", "x" * 300, "")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
def test_an_answers_header_never_becomes_a_path(header: str, name: str, hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add("me/model", model)
    home = tmp_path / "home"
    (home / ".aws").mkdir(parents=True)
    hub.headers = {header: f'"{name.format(home=home)}"' if header != "X-Repo-Commit" else name.format(home=home)}
    before = _everything(home)
    with pytest.raises(StoreMisconfigured, match=rf"the hub's answer is refused: its {header} .* is not safe as the"):
        _fetch(hub, tmp_path)
    assert _everything(home) == before
    assert not [path for path in _everything(tmp_path / "cache") if path.is_file() and b"aws" in path.read_bytes()]


def _commit(answer: Any) -> Any:
    return {**answer, "sha": "../../../../home/.aws/x"} if isinstance(answer, dict) else answer


def _entry(**changes: Any) -> Callable[[Any], Any]:
    return lambda answer: [{**entry, **changes} for entry in answer] if isinstance(answer, list) else answer


@pytest.mark.parametrize(
    ("twist", "what"),
    [
        (_commit, "commit"),
        (lambda answer: {**answer, "sha": 5} if isinstance(answer, dict) else answer, "commit"),
        (
            lambda answer: {**answer, "siblings": [{"rfilename": "../x"}]} if isinstance(answer, dict) else answer,
            "file",
        ),
        (_entry(path="../../x"), "file"),
        (_entry(path="/etc/x"), "file"),
        (_entry(path="a\\..\\b"), "file"),
        (_entry(path="a\nb"), "file"),
        (_entry(oid="../../x"), "content"),
        (_entry(lfs={"oid": "../../x", "size": 1, "pointerSize": 1}), "content"),
        (_entry(lfs={"sha256": "/abs", "size": 1, "pointerSize": 1}), "content"),
        (_entry(xetHash="../x"), "content"),
    ],
)
def test_a_name_in_the_api_never_becomes_a_path(
    twist: Callable[[Any], Any], what: str, hub: Hub, model: Path, tmp_path: Path
) -> None:
    hub.add("me/model", model)
    hub.twist = twist
    with pytest.raises(
        StoreMisconfigured, match=rf"model\.source: hf://me/model at .*: its {what} .* check HF_ENDPOINT"
    ):
        _fetch(hub, tmp_path)
    assert not [path for path in _everything(tmp_path / "cache") if path.is_file()]


def test_a_page_of_files_is_never_taken_from_elsewhere(hub: Hub, model: Path, tmp_path: Path) -> None:
    """Else the second page would pass for the content of a file, which nobody looks into."""
    hub.add("me/model", model)
    hub.headers = {"Link": f'<{hub.endpoint}/me/model/resolve/main/x>; rel="next"'}
    with pytest.raises(StoreMisconfigured, match="its next page is not one of its API"):
        _fetch(hub, tmp_path)


def test_an_answer_that_was_redirected_is_looked_into() -> None:
    asked = httpx2.Request("GET", "http://hub/api/models/me/model", extensions={"finetune.is_api": True})
    elsewhere = httpx2.Request("GET", "http://hub/x/resolve/y", extensions=asked.extensions)
    with pytest.raises(UnsafeAnswer, match="its commit"):
        check(httpx2.Response(200, json={"sha": "../x"}, request=elsewhere))


@pytest.mark.parametrize(
    "etag", ['"5f3a-62"', 'W/"abc"', '"' + "a" * 64 + '"', '"d41d8cd98f00b204e9800998ecf8427e-12"']
)
def test_etags_of_real_servers_are_taken(etag: str, hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add("me/model", model)
    hub.headers = {"ETag": etag}
    assert (_fetch(hub, tmp_path) / "config.json").read_bytes() == CREDENTIAL_PROCESS


def test_a_mirror_does_not_fill_the_cache_of_the_hub(hub: Hub, model: Path, tmp_path: Path) -> None:
    """A Secret names the endpoint: it must not decide what a job with another Secret reads from a shared cache."""
    hub.add("me/model", model)
    assert "mirrors" in _fetch(hub, tmp_path).parts
    nowhere = Credentials("model", {"HF_ENDPOINT": "http://127.0.0.1:9"})
    with pytest.raises(StoreError, match="does not answer"):
        fetch_from_hub(uri.parse("hf://me/model"), nowhere, tmp_path / "cache", attempts=1)


@pytest.mark.parametrize(
    "says", [[], None, "x", {"sha": None}, {"id": "x", "sha": "a" * 40, "siblings": [None]}, {"siblings": {"a": "b"}}]
)
def test_an_answer_of_another_form_is_told_in_a_sentence(says: Any, hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add("me/model", model)
    hub.twist = lambda answer: says
    with pytest.raises(StoreUnavailable, match=r"at http\S+: the hub's answer cannot be read \(\w+Error\): check"):
        _fetch(hub, tmp_path, attempts=1)


def test_a_next_page_that_is_no_address_is_refused(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add("me/model", model)
    hub.headers = {"Link": '<http://[::bad>; rel="next"'}
    with pytest.raises(StoreMisconfigured, match="its next page is not one of its API"):
        _fetch(hub, tmp_path)


def test_an_answer_without_an_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few bytes it has on the way."""
    monkeypatch.setattr(hub_answers, "MAX_BYTES", 1 << 20)
    request = httpx2.Request("GET", "http://hub/api/models/x", extensions={"finetune.is_api": True})
    bomb = gzip.compress(b" " * (64 << 20))
    answer = httpx2.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx2.ByteStream(bomb), request=request)
    with pytest.raises(UnsafeAnswer, match="what its API says is longer than 1 MiB"):
        check(answer)
    nested = httpx2.Response(200, stream=httpx2.ByteStream(b"[" * 100_000), request=request)
    with pytest.raises(UnsafeAnswer, match="what its API says nests too deep"):
        check(nested)


@pytest.mark.parametrize("place", ["file:///etc/passwd", "http://127.0.0.1:9", "ftp://host/x", "x" * 100_000])
def test_a_file_that_is_sent_elsewhere_is_told_in_a_sentence(
    place: str, hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("me/model", model)
    hub.cdn = place
    with pytest.raises(StoreUnavailable, match=r"the hub's answer cannot be read|the hub does not answer"):
        _fetch(hub, tmp_path, attempts=1)


def test_a_file_is_stopped_at_the_size_that_the_hub_announced(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add("me/model", model)
    hub.more = 1 << 30
    with pytest.raises(StoreMisconfigured, match=rf"a file is longer than the {len(CREDENTIAL_PROCESS)} bytes that it"):
        _fetch(hub, tmp_path)
    assert hub.sent < 64 << 20
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1 << 20]
