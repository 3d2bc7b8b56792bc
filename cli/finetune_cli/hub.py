"""One small file from the model hub, with nothing but the standard library: plan is not to wait for more."""

from __future__ import annotations

import os
from http.client import HTTPException
from typing import Any
from urllib import request
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from finetune_api import uri
from finetune_cli.errors import CliError, Exit

DEFAULT_ENDPOINT = "https://huggingface.co"
#: Whoever plans is waiting.
_SECONDS = 10
#: More than any model's configuration has.
_MAX_BYTES = 4 << 20


def read(source: uri.Uri, revision: str, name: str) -> bytes:
    """The file `name` of a repository (below the path of `source`) at `revision`. Raises CliError.

    $HF_ENDPOINT and $HF_TOKEN are honored.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    token = os.environ.get("HF_TOKEN", "").strip()
    path = "/".join(part for part in (source.path.strip("/"), name) if part)
    where = f"{source} at {uri.redacted(endpoint)}"
    try:
        address = f"{endpoint}/{source.authority}/resolve/{quote(revision, safe='')}/{quote(path)}"
        wanted = request.Request(address)  # noqa: S310 - the opener below knows http and https alone
        if token:
            wanted.add_header("Authorization", f"Bearer {token}")
        with _opener().open(wanted, timeout=_SECONDS) as answer:
            return bytes(answer.read(_MAX_BYTES))
    except HTTPError as error:
        code = error.headers.get("X-Error-Code", "")
        raise _refusal(error.code, code, where, f"{path} at revision {revision}", bool(token)) from None
    except ValueError:
        hint = f"for example {DEFAULT_ENDPOINT}"
        raise CliError(f"HF_ENDPOINT: {uri.redacted(endpoint)!r} is no URL", hint=hint) from None
    except (OSError, HTTPException) as error:
        raise CliError(f"{where}: the hub is out of reach: {_cause(error)}", code=Exit.UNREACHABLE) from None


class _Redirects(request.HTTPRedirectHandler):
    """Follows the hub within itself and to its CDN, which is not to see the token."""

    def redirect_request(self, req: request.Request, *rest: Any) -> request.Request | None:
        new = super().redirect_request(req, *rest)
        if new is not None and urlsplit(new.full_url)[:2] != urlsplit(req.full_url)[:2]:
            new.remove_header("Authorization")
        return new


def _opener() -> request.OpenerDirector:
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(),
        request.HTTPHandler(),
        request.HTTPSHandler(),
        request.HTTPErrorProcessor(),
        request.HTTPDefaultErrorHandler(),
        request.UnknownHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def _cause(error: Exception) -> str:
    """What is behind urllib's wrapping, in a few words."""
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)


def _refusal(status: int, code: str, where: str, what: str, has_token: bool) -> CliError:
    if code == "GatedRepo":
        hint = "accept its terms on the hub, and set HF_TOKEN of that account"
        return CliError(f"{where} is gated", hint=hint, code=Exit.UNREACHABLE)
    if code in ("RevisionNotFound", "EntryNotFound"):
        return CliError(f"{where} has no {what}")
    if code == "RepoNotFound" or status == 404:
        return CliError(f"{where} does not exist, or {'your HF_TOKEN may not see it' if has_token else 'is private'}")
    if status in (401, 403):
        return CliError(f"{where}: the hub refuses you (HTTP {status})", hint="check HF_TOKEN", code=Exit.UNREACHABLE)
    return CliError(f"{where}: the hub answered HTTP {status}", code=Exit.UNREACHABLE)
