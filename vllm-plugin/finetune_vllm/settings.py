"""The plugin's settings, all from the environment of the vLLM server."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api import uri
from finetune_cli.storage import cache_folder


@dataclass(frozen=True)
class Settings:
    """What to serve and how.

    Attributes:
        prefix: Where adapters lie, each in the folder of its name; FINETUNE_ADAPTERS.
        cache: Folder for verified copies, of this user alone; FINETUNE_ADAPTERS_CACHE.
        cache_bytes: What they may take together; FINETUNE_ADAPTERS_CACHE_GIB.
        base: The base model that is served, where vLLM was given a folder for it; FINETUNE_BASE_MODEL.
        commit: Its commit; adapters of another one are refused. FINETUNE_BASE_COMMIT.
        reload_seconds: How often to look for newer manifests, 0 for never; FINETUNE_RELOAD_SECONDS.
        server: This vLLM server, which is told to load the newer adapter; FINETUNE_VLLM_SERVER.
        env: The environment: credentials, and FINETUNE_PUBLIC_KEY.
    """

    prefix: uri.Uri
    cache: Path
    cache_bytes: int = 64 << 30
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
        cache = _cache(env)
        gib = env.get("FINETUNE_ADAPTERS_CACHE_GIB") or str(cls.cache_bytes >> 30)
        if not gib.isdecimal() or int(gib) < 1:
            raise ValueError(f"FINETUNE_ADAPTERS_CACHE_GIB: {gib!r} is no whole number of GiB of at least 1")
        seconds = env.get("FINETUNE_RELOAD_SECONDS") or "60"
        if not seconds.isdecimal():
            raise ValueError(f"FINETUNE_RELOAD_SECONDS: {seconds!r} is no whole number of seconds")
        server = (env.get("FINETUNE_VLLM_SERVER") or cls.server).rstrip("/")
        if not server.startswith(("http://", "https://")):
            raise ValueError(f"FINETUNE_VLLM_SERVER: {uri.redacted(server)} is no http:// or https:// URL")
        base, commit = env.get("FINETUNE_BASE_MODEL") or None, env.get("FINETUNE_BASE_COMMIT") or None
        return cls(parsed, cache, int(gib) << 30, base, commit, float(seconds), server, dict(env))


def _cache(env: Mapping[str, str]) -> Path:
    """Return the folder for copies; by default in the user's own cache, for others can write to what all share."""
    try:
        folder = Path(env.get("FINETUNE_ADAPTERS_CACHE") or cache_folder(env) / "adapters").absolute()
        uri.parse(f"file://{folder}", ("file",))
    except (ValueError, RuntimeError) as error:  # RuntimeError: the user has no home
        raise ValueError(f"FINETUNE_ADAPTERS_CACHE: {error}") from None
    return folder
