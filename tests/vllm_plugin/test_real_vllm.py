"""The plugin in vLLM's own server code: its registry, its names of models, its API. Only the engine is a stand-in.

Not among the packages of `make test`: it runs where vLLM can be imported, on a GPU or not.
"""

import asyncio
import importlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.vllm.adapters import BASE, put

serving = pytest.importorskip(
    "vllm.entrypoints.openai.models.serving", reason="vLLM is not installed", exc_type=ImportError
)


class Engine:
    """Keeps what the server has it load."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(model=BASE, max_model_len=2048)
        self.renderer = self.input_processor = None
        self.loaded: list[Any] = []

    async def add_lora(self, request: Any) -> bool:
        weights = await asyncio.to_thread((Path(request.lora_path) / "adapter_model.safetensors").read_text)
        self.loaded.append((request.lora_name, request.lora_int_id, request.load_inplace, weights))
        return True


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen()  # who connects before the server runs waits
        settings = {
            "FINETUNE_ADAPTERS": f"file://{tmp_path}/adapters",
            "FINETUNE_ADAPTERS_CACHE": f"{tmp_path}/cache",
            "FINETUNE_RELOAD_SECONDS": "0",
            "FINETUNE_VLLM_SERVER": f"http://127.0.0.1:{found.getsockname()[1]}",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delitem(sys.modules, "finetune_vllm.resolver", raising=False)
        yield found


def test_in_vllms_own_server_a_name_is_resolved_and_a_newer_adapter_is_loaded_in_place(
    tmp_path: Path, port: socket.socket
) -> None:
    import fastapi
    import uvicorn
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.serve.lora.api_router import attach_router
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    importlib.import_module("finetune_vllm.plugin").register()
    resolver = LoRAResolverRegistry.get_resolver("finetune")
    assert isinstance(resolver, LoRAResolver)
    put(tmp_path / "adapters/nli")
    put(tmp_path / "adapters/other", baseModel="other/model")

    async def serve() -> Engine:
        engine = Engine()
        models = serving.OpenAIServingModels(engine, [BaseModelPath(name="base", model_path=BASE)])
        app = fastapi.FastAPI()
        attach_router(app)
        app.state.openai_serving_models = models
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        running = asyncio.create_task(server.serve([port]))
        try:
            first = await models.resolve_lora("nli")
            assert isinstance(first, LoRARequest)
            assert await models.resolve_lora("nli") is first
            assert (await models.resolve_lora("other")).error.code == 404
            assert (await models.resolve_lora("../nli")).error.code == 404
            put(tmp_path / "adapters/nli", "two")
            await asyncio.to_thread(resolver.reload)
            second = await models.resolve_lora("nli")
            assert isinstance(second, LoRARequest)
            assert (second.lora_int_id, second.load_inplace) == (first.lora_int_id, False)
            assert second.lora_path != first.lora_path
        finally:
            server.should_exit = True
            await running
        return engine

    loaded = asyncio.run(serve()).loaded
    assert [(name, in_place, weights) for name, _, in_place, weights in loaded] == [
        ("nli", False, "one"),
        ("nli", True, "two"),
    ]
