"""Who asks a registry: from a Secret of type kubernetes.io/dockerconfigjson, or the user's ~/.docker/config.json."""

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from finetune_api import constants
from finetune_trainer import redact
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import StoreMisconfigured

#: More than any such file has.
_MAX_BYTES: Final = 1 << 20
#: Docker's own registry is known by another name in these files.
_HUB: Final = ("docker.io", "registry-1.docker.io", "index.docker.io")


def login(registry: str, credentials: Credentials) -> tuple[str, str] | None:
    """Return user and password for `registry`, None to ask as nobody.

    Raises:
        StoreMisconfigured: The file is none of Docker's, or names a program that would have to be asked.
    """
    text, where = credentials.get(constants.DOCKER_CONFIG_KEY), credentials.where
    if text is None and not credentials.in_pod:
        folder = credentials.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")  # noqa: PTH111
        file = Path(folder) / "config.json"
        text, where = (_read(file), str(file)) if file.is_file() else (None, where)
    if text is None:
        return None
    try:
        entries = dict(json.loads(text).get("auths") or {})
        found = next((entries[key] for key in entries if _host(key) in _names(registry)), None)
        return None if found is None else _user(found)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise StoreMisconfigured(
            f"{constants.DOCKER_CONFIG_KEY} is no configuration of Docker's with user and password for {registry}"
            f" ({where}): kubectl create secret docker-registry makes one"
        ) from None


def _read(file: Path) -> str:
    with file.open("rb") as opened:
        return opened.read(_MAX_BYTES).decode()


def _names(registry: str) -> tuple[str, ...]:
    return _HUB if registry in _HUB else (registry,)


def _host(key: str) -> str:
    return key.partition("://")[2].partition("/")[0] if "://" in key else key.partition("/")[0]


def _user(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return user and password of an entry; raises ValueError."""
    if "auth" in entry:
        user, colon, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
        redact.remember(entry["auth"])
    else:
        user, colon, password = str(entry.get("username", "")), ":", str(entry.get("password", ""))
    if not (user and colon and password):
        raise ValueError
    redact.remember(password)
    return user, password
