"""Log in to a registry as it asks for it: https://distribution.github.io/distribution/spec/auth/token/."""

import base64
import json
import re
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

from finetune_trainer import redact
from finetune_trainer.stores import endpoints
from finetune_trainer.stores.credentials import origin
from finetune_trainer.stores.errors import StoreMisconfigured, StoreUnavailable
from finetune_trainer.stores.oci.proxies import Pools

_MAX_BYTES: Final = 1 << 20
#: What a header can carry.
_TOKEN: Final = re.compile("[!-~]+")
_CHALLENGE: Final = re.compile(r'(\w+)="([^"]*)"')


class TokenRefused(Exception):
    """The server for tokens answers with another status."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status, self.body = status, body


def authorization(challenge: str, login: tuple[str, str] | None, pool: Pools, where: str, is_secure: bool) -> str:
    """Return what answers the registry's challenge: user and password, or a token for them; '' if nothing does.

    Args:
        challenge: Its WWW-Authenticate header.
        login: User and password.
        pool: Asks the server for tokens.
        where: What messages begin with.
        is_secure: Whether the registry is spoken to with TLS.

    Raises:
        StoreMisconfigured: The server for tokens must not be asked.
        TokenRefused: It gives no token.
    """
    kind, _, rest = challenge.partition(" ")
    if kind.lower() == "basic" and login:
        return _basic(login)
    asked = dict(_CHALLENGE.findall(rest))
    if kind.lower() != "bearer" or "realm" not in asked:
        return ""
    realm = asked["realm"]
    if urlsplit(realm).scheme != "https" and is_secure:
        raise StoreMisconfigured(f"{where}: the registry sends its users to {origin(realm)} without https")
    if problem := endpoints.refusal(realm):
        raise StoreMisconfigured(f"{where}: the registry's own server for tokens: {problem}")
    query = urlencode({key: asked.get(key, "") for key in ("service", "scope")})
    headers = {"Authorization": _basic(login)} if login else {}
    answer = pool.request(
        "GET", f"{realm}{'&' if '?' in realm else '?'}{query}", headers=headers, preload_content=False, redirect=False
    )
    read = answer.read(_MAX_BYTES)
    answer.release_conn()
    if answer.status != 200:
        raise TokenRefused(answer.status, read)
    try:
        found: dict[str, Any] = json.loads(read)
        token = found.get("token") or found["access_token"]
        if not _TOKEN.fullmatch(token):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise StoreUnavailable(f"{where}: the registry's server for tokens gives none") from None
    redact.remember(token)
    return f"Bearer {token}"


def _basic(login: tuple[str, str]) -> str:
    """Return user and password as Docker sends them: in UTF-8."""
    return f"Basic {base64.b64encode(':'.join(login).encode()).decode()}"
