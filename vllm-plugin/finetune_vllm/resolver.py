"""vLLM's LoRAResolver, and the thread that tells the server of newer adapters.

vLLM asks a resolver once for each name and keeps what it loaded. A newer manifest is therefore told by the server's own
API (POST /v1/load_lora_adapter with load_inplace), once its adapter is verified.
https://docs.vllm.ai/en/latest/design/lora_resolver_plugins.html
"""

import asyncio
import json
import logging
import threading
import urllib.request

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from finetune_trainer.errors import TrainerError
from finetune_vllm.adapters import Adapter, Adapters
from finetune_vllm.settings import Settings

log = logging.getLogger(__name__)
_TIMEOUT = 300.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another server, and a GET there loads nothing: it fails as HTTP 3xx."""

    def redirect_request(self, *_: object) -> None:
        return None


#: The pod's own server is not asked through a proxy, which would see the key.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


class VerifiedResolver(LoRAResolver):  # type: ignore[misc]
    """Resolves the name of a model to the verified copy of the adapter of that name."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._adapters = Adapters(settings)
        self._served: dict[str, tuple[Adapter, str]] = {}  # name: adapter, base
        self._lock = threading.Lock()
        self._watcher: threading.Thread | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the request that loads the adapter; None if there is none, or if it is refused (the log says why)."""
        adapter = await asyncio.to_thread(self._fetch, lora_name, base_model_name)
        if adapter is None:
            return None
        self._serve(lora_name, adapter, base_model_name)
        self._watch()
        number = int(adapter.digest[:7], 16) + 1  # vLLM replaces it by its own
        return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(adapter.folder))

    def reload(self) -> None:
        """Load newer adapters in place of those that are served. What is refused leaves the present one served."""
        with self._lock:
            served = dict(self._served)
        for name, (present, base) in served.items():
            try:
                if self._adapters.digest(name) in (None, present.digest):
                    continue
                if (adapter := self._adapters.fetch(name, base)) is None:
                    continue
                if adapter.digest == present.digest:
                    adapter.copy.release()
                    continue
                self._load_in_place(name, adapter)
            except (TrainerError, OSError) as error:
                log.warning("Adapter %s: the newer one is not loaded, the present one stays: %s", name, error)
                continue
            log.info("Adapter %s: loaded the newer one, sha256:%s", name, adapter.digest)
            self._serve(name, adapter, base)

    def _serve(self, name: str, adapter: Adapter, base: str) -> None:
        """Keep the copy from now on, in the place of what was served by that name."""
        with self._lock:
            before = self._served.get(name)
            self._served[name] = (adapter, base)
        if before:
            before[0].copy.release()

    def _fetch(self, name: str, base: str) -> Adapter | None:
        try:
            return self._adapters.fetch(name, base)
        except (TrainerError, OSError) as error:
            log.error("Adapter %s: refused: %s", name, error)
            return None

    def _load_in_place(self, name: str, adapter: Adapter) -> None:
        body = {"lora_name": name, "lora_path": str(adapter.folder), "load_inplace": True}
        headers = {"Content-Type": "application/json"}
        if key := self._settings.env.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self._settings.server}/v1/load_lora_adapter"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - http or https: Settings
        try:
            with _OPENER.open(request, timeout=_TIMEOUT):
                pass
        except BaseException:
            adapter.copy.release()
            raise

    def _watch(self) -> None:
        with self._lock:
            if self._watcher is not None or not self._settings.reload_seconds:
                return
            self._watcher = threading.Thread(target=self._run, name="finetune-reload", daemon=True)
        self._watcher.start()

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._settings.reload_seconds):
            try:
                self.reload()
            except Exception:  # the thread must live on; a fault of ours is logged with its traceback
                log.exception("Looking for newer adapters failed")
