"""How a registry is asked, and with which login: a kubernetes.io/dockerconfigjson, or ~/.docker/config.json."""

import base64
import json
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from finetune_api import constants
from finetune_trainer import redact
from finetune_trainer.stores import certificates
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import StoreMisconfigured

#: More than any such file has.
_MAX_BYTES: Final = 1 << 20
_LOOPBACK: Final = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")
#: Keys of the Secret, beside Docker's.
PLAIN_HTTP: Final = "REGISTRY_PLAIN_HTTP"
CA_BUNDLE: Final = "REGISTRY_CA_BUNDLE"
#: Docker's own registry is known by another name in these files.
_HUB: Final = ("docker.io", "registry-1.docker.io", "index.docker.io")


def scheme(registry: str, credentials: Credentials, field: str) -> str:
    """Return https, or http where REGISTRY_PLAIN_HTTP is true or, as Docker has it, on this machine's own address.

    Raises:
        StoreMisconfigured: The setting is neither true nor false.
    """
    asked = credentials.get(PLAIN_HTTP) or str(_LOOPBACK.fullmatch(registry) is not None)
    if asked.lower() not in ("true", "false"):
        raise StoreMisconfigured(f"{field}: {PLAIN_HTTP} must be true or false ({credentials.where})")
    return "http" if asked.lower() == "true" else "https"


def tls(credentials: Credentials, field: str) -> ssl.SSLContext:
    """Return which certificates are trusted: the system's, and those in the file that REGISTRY_CA_BUNDLE names.

    Raises:
        StoreMisconfigured: There are none in that file.
    """
    context = ssl.create_default_context()
    if bundle := credentials.get(CA_BUNDLE):
        if fault := certificates.fault_of(bundle):
            raise StoreMisconfigured(f"{field}: {CA_BUNDLE} must be {fault} ({credentials.where})")
        context.load_verify_locations(cafile=bundle)
    return context


def login(registry: str, credentials: Credentials, field: str) -> tuple[str, str] | None:
    """Return user and password for `registry`, None to ask as nobody.

    Raises:
        StoreMisconfigured: The file is none of Docker's, or names a program that would have to be asked.
    """
    text, where = credentials.get(constants.DOCKER_CONFIG_KEY), credentials.where
    if text is None and not credentials.in_pod:
        folder = credentials.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")  # noqa: PTH111
        file = Path(folder) / "config.json"
        text, where = _read(file, field), str(file)
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


def where_login_is(credentials: Credentials) -> str:
    """Return where a login is set, for messages: what `docker login` writes counts where no pod's Secret does."""
    if credentials.in_pod or credentials.get(constants.DOCKER_CONFIG_KEY) is not None:
        return credentials.where
    return f"in {credentials.get('DOCKER_CONFIG') or '~/.docker'}/config.json (docker login writes it)"


def _read(file: Path, field: str) -> str | None:
    """Return the file's text, None without one; `sudo docker login` leaves one that its user cannot read."""
    try:
        if not file.is_file():
            return None
        with file.open("rb") as opened:
            return opened.read(_MAX_BYTES).decode(errors="replace")
    except OSError as error:
        raise StoreMisconfigured(f"{field}: Docker's {file} cannot be read: {error.strerror}") from None


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
