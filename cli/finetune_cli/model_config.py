"""The base model's config.json, which tells its shape: read where the model lies, and nothing else of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api import uri
from finetune_cli.errors import CliError

if TYPE_CHECKING:
    from finetune_api.spec_data import Model

CONFIG_FILE = "config.json"
#: Patience with a store, for whoever plans is waiting.
_SECONDS = 10


def read(path: Path) -> dict[str, Any]:
    """The configuration in a file of this machine. Raises CliError."""
    try:
        return _parsed(path.read_bytes(), str(path))
    except OSError as error:
        raise CliError(f"{path}: cannot be read: {error.strerror}") from None


def fetch(model: Model) -> dict[str, Any]:
    """The configuration of a job's base model, from the hub, a bucket or this machine. Raises CliError."""
    source = uri.parse(model.source)
    if source.scheme == "hf":
        from finetune_cli import hub

        data = hub.read(source, model.revision or "main", CONFIG_FILE)
    else:
        from finetune_cli.stores import open_remote

        data = open_remote(str(source), seconds=_SECONDS, tries=1).read(CONFIG_FILE)
    return _parsed(data, str(source.join(CONFIG_FILE)))


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CliError(f"{where}: is no model's configuration, which is a JSON object")
    return found
