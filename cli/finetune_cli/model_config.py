"""The base model's config.json, which tells its shape: fetched from the model's source, and nothing else of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api import uri
from finetune_cli import storage
from finetune_cli.errors import CliError
from finetune_trainer.planning import known_models

if TYPE_CHECKING:
    from finetune_api.spec_data import Model

CONFIG_FILE = "config.json"
#: Seconds to wait for a store's answer: the user is waiting for a plan.
TIMEOUT = 10
#: More than the configuration of any model has.
MAX_BYTES = 4 << 20


def read(path: Path) -> dict[str, Any]:
    """Read the configuration from a local file, or from the model's folder. Raises CliError."""
    path = path / CONFIG_FILE if path.is_dir() else path
    try:
        return _parse(_bounded(path), f"--model-config: {path}")
    except OSError as error:
        raise CliError(f"--model-config: {path}: cannot be read: {error.strerror}") from None


def fetch(model: Model) -> dict[str, Any]:
    """Return the configuration of a job's base model: a known one, or from the hub, a bucket or this machine.

    Raises CliError.
    """
    source = uri.parse(model.source)
    known = None if model.revision else known_models.config_of(model.source)
    if known:
        return known
    if source.scheme == "hf":
        file = source.join(CONFIG_FILE)
        return _parse(_bounded(_from_hub(file, model.revision)), str(file))
    store = storage.open_store(str(source), role="model", subject="model.source", timeout=TIMEOUT)
    data = b""
    with storage.store_errors():
        for chunk in store.stream(CONFIG_FILE):
            data += chunk
            if len(data) > MAX_BYTES:
                break
    return _parse(data, str(source.join(CONFIG_FILE)))


def _from_hub(file: uri.Uri, revision: str | None) -> Path:
    """Download one file into the cache that `finetune run` uses too. $HF_ENDPOINT and $HF_TOKEN are honored."""
    with storage.store_errors():
        from finetune_trainer.stores.credentials import Credentials
        from finetune_trainer.stores.hub import fetch_from_hub

        cache = storage.cache_folder(os.environ) / "hub"
        credentials = Credentials.from_environment("model")
        return fetch_from_hub(file, credentials, cache, revision=revision, attempts=1)


def _bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data) if len(data) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CliError(f"{where}: is not a model configuration, which is a JSON object")
    return found
