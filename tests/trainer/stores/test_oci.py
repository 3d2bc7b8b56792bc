"""An image in a registry as a store. On the stand-in, and on Docker's registry where that is installed."""

import base64
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import urllib3

from finetune_api.uri import parse
from finetune_trainer import redact
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.stores import manifest as store_manifest
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import (
    AlreadyExists,
    StoreAccessDenied,
    StoreCorrupted,
    StoreMisconfigured,
    StoreUnavailable,
)
from finetune_trainer.stores.oci import layer
from finetune_trainer.stores.oci.credentials import where_login_is
from finetune_trainer.stores.oci.store import OciStore
from finetune_trainer.stores.oci.tokens import authorization
from support.stores.bundles import output
from support.stores.images import FILES, bundle, open_image
from support.stores.registry import PASSWORD, USER, Registry, registry, standin_registry

__all__ = ["registry"]


@pytest.fixture
def standin() -> Iterator[Registry]:
    with standin_registry() as found:
        yield found


def test_an_adapter_is_pushed_and_every_digest_is_read_back(registry: Registry, tmp_path: Path) -> None:
    target = output(open_image(registry, "team/nli:v1", tmp_path))
    assert target.find_published() is None
    seen: list[str] = []

    def before(at: AdapterOutput, digests: Any) -> None:
        seen.extend(sorted(digests))
        at.store.download(
            "adapter_model.safetensors", tmp_path / "back", sha256=digests["adapter_model.safetensors"].sha256
        )
        assert not at.store.exists("manifest.json")

    made = target.publish(bundle(tmp_path / "adapter"), before)
    assert seen == sorted(FILES)
    assert made.uri == registry.uri("team/nli:v1")
    assert (tmp_path / "back").read_bytes() == FILES["adapter_model.safetensors"]
    again = open_image(registry, "team/nli:v1", tmp_path)
    manifest, data = store_manifest.read(again) or pytest.fail("no manifest")
    store_manifest.verify(again, manifest)
    assert store_manifest.digest_of(data) == made.manifest_digest
    assert b"".join(again.stream("adapter_model.safetensors", 5)) == FILES["adapter_model.safetensors"][5:]
    assert [each.path for each in again.list("training")] == ["training/job.yaml"]
    assert output(again).find_published() == made  # another attempt of the same job
    with pytest.raises(
        AlreadyExists, match=r"output\.oci\.uri: oci://.*/team/nli:v1 already holds an adapter \(of nli"
    ):
        output(again, uid="2").find_published()
    replaced = output(again, uid="2", overwrite=True)
    assert replaced.find_published() is None
    assert replaced.publish(bundle(tmp_path / "adapter")).manifest_digest != made.manifest_digest


def fetch(registry: Registry, path: str, accept: str) -> bytes:
    headers = urllib3.make_headers(basic_auth=f"{USER}:{PASSWORD}") | {"Accept": accept}
    return urllib3.request("GET", f"http://{registry.address}/v2/{path}", headers=headers).data


def test_it_is_an_image_that_a_node_can_mount(registry: Registry, tmp_path: Path) -> None:
    """What containerd and CRI-O do: take the image of their processor, check every digest, unpack the layers."""
    output(open_image(registry, "team/volume:v1", tmp_path)).publish(bundle(tmp_path / "adapter"))
    index = json.loads(fetch(registry, "team/volume/manifests/v1", "application/vnd.oci.image.index.v1+json"))
    assert {each["platform"]["architecture"] for each in index["manifests"]} == {"amd64", "arm64"}
    root = tmp_path / "mounted"
    for image in index["manifests"]:
        data = fetch(registry, f"team/volume/manifests/{image['digest']}", image["mediaType"])
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == image["digest"]
        manifest = json.loads(data)
        config = json.loads(fetch(registry, f"team/volume/blobs/{manifest['config']['digest']}", "*/*"))
        assert config["architecture"] == image["platform"]["architecture"]
        assert config["rootfs"]["diff_ids"] == [each["digest"] for each in manifest["layers"]]
        for each in manifest["layers"]:
            blob = fetch(registry, f"team/volume/blobs/{each['digest']}", "*/*")
            assert (f"sha256:{hashlib.sha256(blob).hexdigest()}", len(blob)) == (each["digest"], each["size"])
            with tarfile.open(fileobj=BytesIO(blob)) as opened:
                opened.extractall(root, filter="data")
    assert {path: (root / path).read_bytes() for path in FILES} == FILES
    assert (root / "manifest.json").is_file()


def test_files_that_did_not_change_are_not_sent_again(standin: Registry, tmp_path: Path) -> None:
    output(open_image(standin, "team/nli:v1", tmp_path)).publish(bundle(tmp_path / "adapter"))
    standin.requests.clear()
    output(open_image(standin, "team/nli:v2", tmp_path)).publish(bundle(tmp_path / "adapter"))
    sent = [path for method, path in standin.requests if method == "PUT" and "/blobs/" in path]
    assert len(sent) == 3  # manifest.json, and the two configurations that name its layer
    assert layer.Layer.of("a", b"x") == layer.Layer.of("a", b"x")


def test_a_wrong_password_is_told_by_its_field_and_never_shown(registry: Registry, tmp_path: Path) -> None:
    store = open_image(registry, "team/nli:denied", tmp_path, password="wrong-password")
    with pytest.raises(StoreAccessDenied, match=r"output\.oci\.uri: .*denied .*output\.oci\.secretRef") as caught:
        output(store).find_published()
    assert "wrong-password" not in str(caught.value)
    assert "wrong-password" not in redact.redacted("it was wrong-password")


@pytest.mark.parametrize(
    "fault", [("PUT", "/blobs/uploads", 503), ("HEAD", "/blobs/", 500), ("PUT", "/manifests/v1", 502)]
)
def test_a_registry_that_fails_for_a_moment_is_asked_again(
    fault: tuple[str, str, int], standin: Registry, tmp_path: Path
) -> None:
    standin.faults.append(fault)
    output(open_image(standin, "team/nli:v1", tmp_path)).publish(bundle(tmp_path / "adapter"))
    assert not standin.faults


def test_a_registry_that_keeps_failing_leaves_no_tag(
    standin: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_STORE_PATIENCE", "0")
    standin.faults += [("PUT", "/manifests/sha256", 500)]
    store = open_image(standin, "team/nli:v1", tmp_path)
    with pytest.raises(StoreUnavailable, match=r"the registry keeps failing \(HTTP 500, UNKNOWN\)"):
        output(store).publish(bundle(tmp_path / "adapter"))
    assert open_image(standin, "team/nli:v1", tmp_path).entries() == []


def put(registry: Registry, tag: str, document: Any, kind: str) -> str:
    data = json.dumps(document).encode()
    headers = urllib3.make_headers(basic_auth=f"{USER}:{PASSWORD}") | {"Content-Type": kind}
    urllib3.request("PUT", f"http://{registry.address}/v2/team/x/manifests/{tag}", headers=headers, body=data)
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "/etc/passwd", "a\u202eb", ""], ids=["parent", "absolute", "unseen", "none"]
)
def test_an_image_of_hostile_names_is_refused(path: str, standin: Registry, tmp_path: Path) -> None:
    described = replace(layer.Layer.of("x", b"1"), path=path).descriptor()
    digest = put(standin, "inner", {"layers": [described]}, "application/vnd.oci.image.manifest.v1+json")
    put(standin, digest, {"layers": [described]}, "application/vnd.oci.image.manifest.v1+json")
    put(standin, "v1", {"manifests": [{"digest": digest}]}, "application/vnd.oci.image.index.v1+json")
    with pytest.raises(StoreMisconfigured, match="is an image of another kind: a file of a name that is not safe"):
        open_image(standin, "team/x:v1", tmp_path).list()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"digest": "../../other/blobs/sha256:0"}, "a layer whose digest is no SHA-256: 'x'"),
        ({"digest": f"sha256:{'0' * 64}?x"}, "a layer whose digest is no SHA-256: 'x'"),
        ({"size": float("inf")}, "a layer that is no file of ours"),
        ({"size": float("nan")}, "cannot convert float NaN to integer"),
        ({"size": -1}, "a layer whose file does not lie in it: 'x'"),
        ({"annotations": ["x"]}, "a layer that is no file of ours"),
    ],
)
def test_a_layer_that_is_none_of_ours_is_no_layer(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        layer.Layer.read(layer.Layer.of("x", b"1").descriptor() | change)


def test_a_password_is_sent_as_docker_sends_it() -> None:
    """In UTF-8: it need not fit into Latin-1, where urllib3 would put it."""
    sent = authorization('Basic realm="x"', ("née", "pass€wörd"), urllib3.PoolManager(), "oci", is_secure=True)
    assert base64.b64decode(sent.removeprefix("Basic ")).decode() == "née:pass€wörd"


def test_a_login_that_this_user_cannot_read_is_told(
    standin: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `sudo docker login` leaves it; and one whose bytes are no text."""
    credentials = Credentials.from_environment("oci", standin.login(tmp_path))
    root = parse(standin.uri("team/nli:v1"), ("oci",))

    def denied(self: Path, *_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    for name in ("open", "is_file"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, denied)
            with pytest.raises(StoreMisconfigured, match=r"oci: Docker's .* cannot be read: Permission denied"):
                OciStore(root, credentials, "oci")
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(StoreMisconfigured, match="is no configuration of Docker's"):
        OciStore(root, credentials, "oci")


@pytest.mark.parametrize("document", [{}, [], {"manifests": [{}]}, {"layers": []}, {"manifests": "x"}])
def test_an_image_of_somebody_else_is_neither_read_nor_replaced_unasked(
    document: Any, standin: Registry, tmp_path: Path
) -> None:
    put(standin, "v1", document, "application/vnd.oci.image.index.v1+json")
    with pytest.raises(StoreMisconfigured, match=r"output\.oci\.uri: oci://.* is an image of another kind"):
        output(open_image(standin, "team/x:v1", tmp_path)).find_published()


def test_bytes_that_changed_are_noticed(standin: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_image(standin, "team/nli:v1", tmp_path)
    output(store).publish(bundle(tmp_path / "adapter"))
    whole = type(store._client).blob

    def damaged(self: Any, digest: str, start: int, size: int) -> Iterator[bytes]:
        yield from (bytes(len(chunk)) for chunk in whole(self, digest, start, size))

    monkeypatch.setattr(type(store._client), "blob", damaged)
    with pytest.raises(StoreCorrupted, match=r"adapter_model\.safetensors has SHA-256 "):
        store.download("adapter_model.safetensors", tmp_path / "back", sha256="0" * 64)
    assert not list(tmp_path.glob("back*"))


def test_the_login_of_docker_is_a_users(standin: Registry, tmp_path: Path) -> None:
    env = standin.login(tmp_path / "docker")
    store = OciStore(parse(standin.uri("team/nli:v1"), ("oci",)), Credentials.from_environment("oci", env), "oci")
    assert output(store).find_published() is None


@pytest.mark.parametrize(
    "text", ["no JSON", '{"auths": {"HOST": {"auth": "%%"}}}', '{"auths": [1]}', '{"auths": {"HOST": {}}}']
)
def test_a_secret_of_another_kind_is_told(text: str, standin: Registry, tmp_path: Path) -> None:
    values = {".dockerconfigjson": text.replace("HOST", standin.address)}
    with pytest.raises(StoreMisconfigured, match="kubectl create secret docker-registry makes one"):
        OciStore(parse(standin.uri("team/nli:v1"), ("oci",)), Credentials("oci", values), "output.oci.uri")


def test_another_registry_needs_the_administrators_word(
    standin: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_ALLOWED_ENDPOINTS", "https://ghcr.io")
    with pytest.raises(
        StoreMisconfigured, match=r"is not allowed here; allowed: https://ghcr\.io .*allowedHubEndpoints"
    ):
        open_image(standin, "team/nli:v1", tmp_path)


def test_uploads_are_sent_to_the_registry_alone(
    standin: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_image(standin, "team/nli:v1", tmp_path)
    with pytest.raises(StoreMisconfigured, match="the registry sends uploads to http://elsewhere:1, another server"):
        store._client._url("http://elsewhere:1/v2/x")
    mine = f"http://user:word@{standin.address}/v2/x"
    for place in ("//elsewhere/x", "ftp://elsewhere/x", "http://[::1", "http://x:99999/", "data:x", mine):
        with pytest.raises(StoreMisconfigured, match=r"sends uploads to .*, another server") as refused:
            store._client._url(place)
        assert "word" not in str(refused.value)


def test_who_is_refused_learns_where_the_login_is_set() -> None:
    here = Credentials("oci", {"DOCKER_CONFIG": "/home/me/.docker"}, in_pod=False)
    assert where_login_is(here) == "in /home/me/.docker/config.json (docker login writes it)"
    assert "~/.docker/config.json" in where_login_is(Credentials("oci", {}, in_pod=False))
    given = Credentials("oci", {".dockerconfigjson": "{}"}, in_pod=False)
    assert where_login_is(given) == given.where
    assert "Secret" in where_login_is(Credentials("oci", {}, in_pod=True))
