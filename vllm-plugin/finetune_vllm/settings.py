"""The plugin's settings, all from the environment of the vLLM server."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api import uri


@dataclass(frozen=True)
class Settings:
    """What to serve and how.

    Attributes:
        prefix: Where adapters lie, each in the folder of its name; FINETUNE_ADAPTERS.
        cache: Folder for verified copies; FINETUNE_ADAPTERS_CACHE.
        base: The base model that is served, where vLLM was given a folder for it; FINETUNE_BASE_MODEL.
        commit: Its commit; adapters of another one are refused. FINETUNE_BASE_COMMIT.
        reload_seconds: How often to look for newer manifests, 0 for never; FINETUNE_RELOAD_SECONDS.
        server: This vLLM server, which is told to load the newer adapter; FINETUNE_VLLM_SERVER.
        env: The environment: credentials, and FINETUNE_PUBLIC_KEY.
    """

    prefix: uri.Uri
    cache: Path
    base: str | None = None
    commit: str | None = None
    reload_seconds: float = 60.0
    server: str = "http://127.0.0.1:8000"
    env: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Settings | None":
        """Read the settings; None if no prefix is set. Raises ValueError with the variable's name."""
        if not (prefix := env.get("FINETUNE_ADAPTERS")):
            return None
        try:
            parsed = uri.parse(prefix, uri.WRITABLE)
        except ValueError as error:
            raise ValueError(f"FINETUNE_ADAPTERS: {uri.redacted(prefix)}: {error}") from None
        cache = env.get("FINETUNE_ADAPTERS_CACHE") or str(Path(tempfile.gettempdir()) / "finetune-adapters")
        try:
            uri.parse(f"file://{Path(cache).absolute()}", ("file",))
        except ValueError as error:
            raise ValueError(f"FINETUNE_ADAPTERS_CACHE: {error}") from None
        seconds = env.get("FINETUNE_RELOAD_SECONDS") or "60"
        if not seconds.isdecimal():
            raise ValueError(f"FINETUNE_RELOAD_SECONDS: {seconds!r} is no whole number of seconds")
        server = (env.get("FINETUNE_VLLM_SERVER") or cls.server).rstrip("/")
        if not server.startswith(("http://", "https://")):
            raise ValueError(f"FINETUNE_VLLM_SERVER: {uri.redacted(server)} is no http:// or https:// URL")
        base, commit = env.get("FINETUNE_BASE_MODEL") or None, env.get("FINETUNE_BASE_COMMIT") or None
        return cls(parsed, Path(cache), base, commit, float(seconds), server, dict(env))
