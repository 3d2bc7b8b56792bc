"""The vLLM plugin, against the interface that vLLM's source documents: vLLM itself cannot be installed without CUDA.

What stands for vLLM here was written from vllm/lora/resolver.py, vllm/lora/request.py and the server's resolve_lora
and load_lora_adapter (vllm/entrypoints/openai/models/serving.py).
"""

import asyncio
import importlib
import json
import shutil
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from finetune_api.latest import Latest, Promotion
from finetune_trainer.stores.signature import SigningKey
from support.vllm.adapters import BASE, put


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


class Registry:
    def __init__(self) -> None:
        self.resolvers: dict[str, LoRAResolver] = {}

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """vLLM's modules, as far as the plugin imports them; returns its registry."""
    found = Registry()
    parts: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": found},
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "finetune_vllm.resolver", raising=False)
    return found


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Stands for the server's own API: keeps what it is told to load; refuses adapters of the name `refused`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bad = self.path != "/v1/load_lora_adapter" or body["lora_name"] == "refused"
            loaded.append((body, self.headers.get("Authorization")))
            self.send_response(302 if body["lora_name"] == "moved" else 400 if bad else 200)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            loaded.append((self.path, self.headers.get("Authorization")))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None: ...

    loaded: list[Any] = []
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.loaded = loaded  # type: ignore[attr-defined]
    thread = threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


@dataclass
class Plugin:
    """The plugin as a server's process has it after start."""

    registry: Registry
    store: Path

    def start(self, monkeypatch: pytest.MonkeyPatch, **env: str) -> Any:
        settings = {"FINETUNE_ADAPTERS": f"file://{self.store}", "FINETUNE_RELOAD_SECONDS": "0"}
        settings |= {"FINETUNE_ADAPTERS_CACHE": str(self.store.parent / "cache")}
        for name, value in (settings | env).items():
            monkeypatch.setenv(name, value)
        importlib.import_module("finetune_vllm.plugin").register()
        return self.registry.resolvers["finetune"]


@pytest.fixture
def plugin(registry: Registry, tmp_path: Path) -> Plugin:
    (tmp_path / "adapters").mkdir()
    return Plugin(registry, tmp_path / "adapters")


def resolve(resolver: Any, name: str, base: str = BASE) -> LoRARequest | None:
    return asyncio.run(resolver.resolve_lora(base, name))


def copies(plugin: Plugin) -> list[str]:
    """What is in the cache, whole or not."""
    return [path.name for path in (plugin.store.parent / "cache").iterdir() if path.name != ".lock"]


def test_by_the_interface_in_vllms_source_a_name_resolves_to_a_verified_copy(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = put(plugin.store / "nli")
    resolver = plugin.start(monkeypatch)
    assert isinstance(resolver, LoRAResolver)
    found = resolve(resolver, "nli")
    assert found is not None
    assert (found.lora_name, found.lora_int_id > 0) == ("nli", True)
    assert Path(found.lora_path) == plugin.store.parent / "cache" / digest
    assert (Path(found.lora_path) / "adapter_model.safetensors").read_text() == "one"
    assert resolve(resolver, "nli") == found


def test_without_a_prefix_nothing_is_registered(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINETUNE_ADAPTERS", raising=False)
    importlib.import_module("finetune_vllm.plugin").register()
    assert registry.resolvers == {}


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FINETUNE_ADAPTERS", "hf://owner/name"),
        ("FINETUNE_ADAPTERS", "s3://key:hunter2@bucket/x"),
        ("FINETUNE_RELOAD_SECONDS", "soon"),
        ("FINETUNE_VLLM_SERVER", "file:///etc/passwd"),
        ("FINETUNE_ADAPTERS_CACHE_GIB", "0"),
        ("FINETUNE_ADAPTERS_CACHE_GIB", "-1"),
        ("FINETUNE_ADAPTERS_CACHE_GIB", "64GiB"),
        ("FINETUNE_ADAPTERS_CACHE", "/proc/here/there"),
        ("FINETUNE_ADAPTERS_CACHE", "/tmp/a\nb"),
    ],
)
def test_a_wrong_setting_is_named(plugin: Plugin, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    with pytest.raises(ValueError, match=variable) as refusal:
        plugin.start(monkeypatch, **{variable: value})
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../nli", "nli/../nli", "/etc", "a\\b", "a\x00b", ".hidden", "n" * 300, "nothing", "folder"]
)
def test_names_that_are_none_of_ours_are_left_to_other_resolvers(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(plugin.store / "nli")
    put(plugin.store.parent / "outside")
    (plugin.store / "folder").mkdir()
    assert resolve(plugin.start(monkeypatch), name) is None
    assert "refused" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "env", "sentence"),
    [
        ({"baseModel": "other/model"}, {}, "was trained on other/model, and this server serves mistralai"),
        ({}, {"FINETUNE_BASE_MODEL": "other/model"}, f"was trained on {BASE}, and this server serves other/model"),
        ({}, {"FINETUNE_BASE_COMMIT": "d" * 40}, "was trained on commit cccc"),
        ({"kind": "Merged"}, {}, "holds a Merged, not an adapter"),
        ({"kind": "Checkpoint"}, {}, "holds a Checkpoint, not an adapter"),
        ({"schemaVersion": 9}, {}, "is no manifest of ours"),
    ],
)
def test_what_does_not_fit_the_server_is_refused(
    plugin: Plugin,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    env: dict[str, str],
    sentence: str,
) -> None:
    put(plugin.store / "nli", **changes)
    assert resolve(plugin.start(monkeypatch, **env), "nli") is None
    assert sentence in caplog.text
    assert not copies(plugin)


@pytest.mark.parametrize("damage", ["changed", "longer than it was", None])
def test_damaged_files_are_never_loaded(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str | None
) -> None:
    put(plugin.store / "nli", "correct")
    weights = plugin.store / "nli/adapter_model.safetensors"
    weights.write_text(damage) if damage else weights.unlink()
    assert resolve(plugin.start(monkeypatch), "nli") is None
    assert "Adapter nli: refused" in caplog.text
    assert not copies(plugin)


def test_where_a_key_is_asked_for_only_what_is_signed_with_it_is_loaded(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    private, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = private.public_key().public_bytes(serialization.Encoding.PEM, form).decode()
    put(plugin.store / "signed", key=SigningKey(private))
    put(plugin.store / "forged", key=SigningKey(other))
    put(plugin.store / "plain")
    resolver = plugin.start(monkeypatch, FINETUNE_PUBLIC_KEY=public)
    assert resolve(resolver, "signed") is not None
    assert (resolve(resolver, "forged"), resolve(resolver, "plain")) == (None, None)
    assert "is not signed with the key" in caplog.text
    assert "is not signed, and" in caplog.text


def test_a_newer_manifest_is_verified_and_loaded_in_place_and_a_bad_one_is_not(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    put(plugin.store / "nli")
    url = f"http://127.0.0.1:{server.server_address[1]}"
    resolver = plugin.start(monkeypatch, FINETUNE_VLLM_SERVER=url, VLLM_API_KEY="key")
    assert resolve(resolver, "nli") is not None
    resolver.reload()
    assert server.loaded == []
    newer = put(plugin.store / "nli", "two")
    resolver.reload()
    folder = str(plugin.store.parent / "cache" / newer)
    asked = {"lora_name": "nli", "lora_path": folder, "load_inplace": True}
    assert server.loaded == [(asked, "Bearer key")]
    resolver.reload()
    assert len(server.loaded) == 1
    put(plugin.store / "nli", "three", baseModel="other/model")
    resolver.reload()
    (plugin.store / "nli/manifest.json").unlink()
    resolver.reload()
    assert len(server.loaded) == 1
    assert "the present one stays: " in caplog.text


def test_a_server_that_does_not_take_it_is_asked_again(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    put(plugin.store / "refused")
    url = f"http://127.0.0.1:{server.server_address[1]}"
    resolver = plugin.start(monkeypatch, FINETUNE_VLLM_SERVER=url)
    assert resolve(resolver, "refused") is not None
    put(plugin.store / "refused", "two")
    resolver.reload()
    resolver.reload()
    assert len(server.loaded) == 2
    assert "HTTP Error 400" in caplog.text


def test_the_key_goes_to_the_server_alone_and_a_redirect_is_no_success(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    put(plugin.store / "moved")
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    resolver = plugin.start(monkeypatch, FINETUNE_VLLM_SERVER=url, VLLM_API_KEY="key")
    assert resolve(resolver, "moved") is not None
    put(plugin.store / "moved", "two")
    resolver.reload()
    assert [body["lora_name"] for body, _ in server.loaded] == ["moved"]
    assert "the present one stays: HTTP Error 302" in caplog.text


def test_a_pointer_that_moves_is_a_newer_adapter(plugin: Plugin, monkeypatch: pytest.MonkeyPatch, server: Any) -> None:
    digests = {path: put(plugin.store / "nli" / path, path) for path in ("one", "two")}

    def point(path: str) -> None:
        entry = {"path": path, "manifestDigest": f"sha256:{digests[path]}", "promotedAt": "2026-01-01T00:00:00Z"}
        (plugin.store / "nli/latest.json").write_bytes(Latest(current=Promotion.model_validate(entry)).to_bytes())

    point("one")
    url = f"http://127.0.0.1:{server.server_address[1]}"
    resolver = plugin.start(monkeypatch, FINETUNE_VLLM_SERVER=url)
    first = resolve(resolver, "nli")
    assert first is not None
    assert Path(first.lora_path).name == digests["one"]
    point("two")
    resolver.reload()
    assert [Path(body["lora_path"]).name for body, _ in server.loaded] == [digests["two"]]


def link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "changed": lambda copy: (copy / "adapter_model.safetensors").write_text("changed here"),
    "cut short": lambda copy: (copy / "adapter_model.safetensors").write_text(""),
    "a file is missing": lambda copy: (copy / "training/job.yaml").unlink(),
    "a file is a folder": lambda copy: [
        (copy / "adapter_config.json").unlink(),
        (copy / "adapter_config.json").mkdir(),
    ],
    "a file leads elsewhere": lambda copy: link(copy / "adapter_config.json", "/etc/hostname"),
    "a folder is a file": lambda copy: [shutil.rmtree(copy / "training"), (copy / "training").write_text("")],
    "all is gone": lambda copy: shutil.rmtree(copy),
    "it is a file": lambda copy: [shutil.rmtree(copy), copy.write_text("")],
    "it leads elsewhere": lambda copy: [copy.rename(copy.parent.parent / "moved"), copy.symlink_to("../moved")],
    "the cache is gone": lambda copy: shutil.rmtree(copy.parent),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_copy_that_is_damaged_here_is_told_removed_and_downloaded_again(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    digest = put(plugin.store / "nli")
    resolver = plugin.start(monkeypatch)
    found = resolve(resolver, "nli")
    assert found is not None
    DAMAGES[damage](Path(found.lora_path))
    caplog.clear()
    assert resolve(resolver, "nli") == found
    assert (Path(found.lora_path) / "adapter_model.safetensors").read_text() == "one"
    assert (Path(found.lora_path) / "training/job.yaml").is_file()
    assert not Path(found.lora_path).is_symlink()
    assert copies(plugin) == [digest]
    assert bool(caplog.records) == ("gone" not in damage)
    if damage == "changed":
        assert "Adapter nli: its copy here is damaged, downloading it again: copy: file://" in caplog.text


def test_the_cache_is_the_users_own_folder_by_default(registry: Registry, tmp_path: Path) -> None:
    from finetune_vllm.settings import Settings

    env = {"FINETUNE_ADAPTERS": "s3://adapters", "XDG_CACHE_HOME": str(tmp_path)}
    settings = Settings.from_env(env)
    assert settings is not None
    assert settings.cache == tmp_path / "finetune/adapters"
    assert settings.cache_bytes == 64 << 30


def test_what_is_served_stays_and_what_was_replaced_may_go(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Room for two: the present one and a newer one."""
    from finetune_vllm.settings import Settings

    put(plugin.store / "nli")
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(Settings, "from_env", classmethod(small(Settings.from_env, 2 * SIZE)))
    resolver = plugin.start(monkeypatch, FINETUNE_VLLM_SERVER=url)
    assert resolve(resolver, "nli") is not None
    for text in ("two", "six", "ten"):
        put(plugin.store / "nli", text)
        resolver.reload()
    assert [(Path(body["lora_path"]) / "adapter_model.safetensors").is_file() for body, _ in server.loaded] == [
        False,
        True,
        True,
    ]
    put(plugin.store / "other", "one")
    assert resolve(resolver, "other") is not None  # in the place of `six`, which is served no more
    put(plugin.store / "third", "two")
    assert resolve(resolver, "third") is None
    assert "refused: 0.0 GiB more do not fit: copies may take 0.0 GiB (FINETUNE_ADAPTERS_CACHE_GIB)" in caplog.text


SIZE = len("{}") + len("one") + len("a: 1\n")


def small(from_env: Callable[..., Any], size: int) -> Callable[..., Any]:
    return lambda cls, env: replace(from_env(env), cache_bytes=size)
