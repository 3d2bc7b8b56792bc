"""Credentials of one role (model, dataset, output, wandb): from its mounted Secret, then from the environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

from finetune_api import constants
from finetune_trainer import redact
from finetune_trainer.stores.errors import StoreMisconfigured

#: Keys that belong together: never take one from the Secret and another from the environment.
_AWS_IDENTITY: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
#: Keys whose values are sent in a header: other characters would break it, and the library's error would quote them.
_HEADER_KEYS: Final = (
    *_AWS_IDENTITY,
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "WANDB_API_KEY",
)
#: Keys of a Secret whose values messages may show, for they say where something is and not who asks.
_PUBLIC: Final = re.compile(r".*(_REGION|_ENDPOINT|_ENDPOINT_URL|_ENDPOINT_URL_S3|_URI|_URL|_NAME|_USERNAME|_BUNDLE)")
#: Values of settings that are no secrets: to hide them would take words out of sentences.
_WORDS: Final = ("true", "false")
_ENV_NAME: Final = re.compile(r"^[A-Z][A-Z0-9_]*$")
_MAX_BYTES: Final = 64 * 1024
_HOST: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?|[0-9A-Fa-f:.]+")


@dataclass(frozen=True)
class Credentials:
    """Settings and secrets of one role, by environment-style key. Its repr shows no value."""

    role: str
    values: Mapping[str, str] = field(repr=False, default_factory=dict)
    in_pod: bool = True

    @classmethod
    def for_role(cls, role: str, env: Mapping[str, str] | None = None, secrets_dir: Path | str | None = None) -> Self:
        """Read the files of <secrets_dir>/<role>, and the environment for keys that they lack.

        Args:
            role: Name of the role.
            env: Default: the process's environment.
            secrets_dir: Default: $FINETUNE_SECRETS_DIR, else constants.SECRETS_DIR. It need not exist.
        """
        env = os.environ if env is None else env
        folder = Path(secrets_dir or env.get(constants.ENV_SECRETS_DIR) or constants.SECRETS_DIR) / role
        secret = _read_secret(folder)
        for key in (*secret, *(key for key in _HEADER_KEYS if key in env)):
            value = secret.get(key) or env[key]
            if not _PUBLIC.fullmatch(key) and value.lower() not in _WORDS:
                redact.remember(value)
        inherited = dict(env)
        if any(key in secret for key in _AWS_IDENTITY[:2]):
            for key in _AWS_IDENTITY:
                inherited.pop(key, None)
        in_pod = constants.ENV_NODE in env or folder.parent.is_dir()
        return cls(role, inherited | secret, in_pod)

    @classmethod
    def from_environment(cls, role: str, env: Mapping[str, str] | None = None) -> Self:
        """Take `env` (default: the process's) alone: on a user's machine there is no Secret."""
        return cls(role, os.environ if env is None else env, in_pod=False)

    def get(self, key: str, default: str | None = None) -> str | None:
        """Return the value of `key` without surrounding whitespace; an empty one counts as absent.

        Raises:
            StoreMisconfigured: It holds a character that no such value can hold. The text does not show it.
        """
        value = self.values.get(key, "").strip()
        if key in _HEADER_KEYS and not _fits_header(key, value):
            raise StoreMisconfigured(
                f"{key} must be one line of visible ASCII characters; this one holds a line break or another character"
                f" that no header can carry: copy it again ({self.where})"
            )
        return value or default

    @property
    def secret_field(self) -> str:
        """The manifest's field that names this role's Secret."""
        below = {"wandb": "logging.wandb", "oci": "output.oci", "hf": "output.hf"}
        return f"{below.get(self.role, self.role)}.secretRef"

    @property
    def where(self) -> str:
        """Where the user sets them, for messages."""
        secret = f"in the Secret named by {self.secret_field} or " if self.in_pod else ""
        return f"{secret}in the environment"

    @property
    def network(self) -> str:
        """What to check when a server does not answer, for messages."""
        return "DNS and NetworkPolicies" if self.in_pod else "DNS and your network"


def _fits_header(key: str, value: str) -> bool:
    is_password = key.endswith(("_PASSWORD", "_USERNAME"))  # encoded before they are sent
    return value.isprintable() if is_password else all("!" <= character <= "~" for character in value)


def _read_secret(folder: Path) -> dict[str, str]:
    """Read a mounted Secret: one file per key. Kubernetes' own '..data' links are no keys."""
    if not folder.is_dir():
        return {}
    files = [path for path in sorted(folder.iterdir()) if _is_key(path.name) and path.is_file()]
    return {path.name: _read_value(path) for path in files}


def _is_key(name: str) -> bool:
    return name == constants.DOCKER_CONFIG_KEY or _ENV_NAME.match(name) is not None


def _read_value(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MAX_BYTES).decode("utf-8", errors="replace").strip()


def origin(url: str) -> str:
    """Return 'https://host:port' of an http(s) URL: all that a message may show, since the rest may hold a password.

    Raises:
        ValueError: It is no URL. The text does not show it: it may be a key under the wrong name.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("is no URL") from None
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host) or any(map(str.isspace, url)):
        raise ValueError("is no http:// or https:// URL")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}" + (f":{port}" if port is not None else "")
