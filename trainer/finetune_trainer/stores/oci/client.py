"""Requests of the registry API v2: https://github.com/opencontainers/distribution-spec/blob/main/spec.md."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from finetune_api import constants
from finetune_trainer import redact
from finetune_trainer.stores import endpoints
from finetune_trainer.stores.credentials import Credentials, origin
from finetune_trainer.stores.errors import (
    StoreAccessDenied,
    StoreCorrupted,
    StoreError,
    StoreMisconfigured,
    StoreNotFound,
    StoreUnavailable,
    too_large,
)
from finetune_trainer.stores.oci.credentials import login

#: Tries while the registry does not answer.
ATTEMPTS: Final = 4
#: Of an answer that is no blob.
MAX_BYTES: Final = 4 << 20
CHUNK_BYTES: Final = 1 << 20
_TIMEOUT: Final = urllib3.Timeout(connect=10, read=60)
_REDIRECTS: Final = 5
_CHALLENGE: Final = re.compile(r'(\w+)="([^"]*)"')
_LOOPBACK: Final = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")

#: Gives the body anew for each try.
Body = Callable[[], Iterable[bytes]]
Response = urllib3.BaseHTTPResponse


class RegistryClient:
    """Asks one registry about one repository."""

    def __init__(self, registry: str, repository: str, credentials: Credentials, field: str) -> None:
        """Prepare to ask. Makes no request; raises StoreMisconfigured for a registry that is not allowed.

        Args:
            registry: host[:port]; https, but for this machine's own, as Docker has it.
            repository: The repository's name.
            credentials: Of the role that asks.
            field: The manifest's field, for messages.
        """
        scheme = "http" if _LOOPBACK.fullmatch(registry) else "https"
        host = "registry-1.docker.io" if registry == "docker.io" else registry
        self.base = f"{scheme}://{host}/v2/{repository}"
        self._where = f"{field}: {registry}/{repository}"
        self._network, self._where_set = credentials.network, credentials.where
        if problem := endpoints.refusal(f"{scheme}://{host}"):
            raise StoreMisconfigured(f"{field}: {problem}")
        self._login = login(registry, credentials)
        self._authorization = ""
        patient = os.environ.get(constants.ENV_STORE_PATIENCE) != "0"
        self._policy = Retrying(
            stop=stop_after_attempt(ATTEMPTS if patient else 1),
            wait=wait_random_exponential(multiplier=0.3, max=5),
            retry=retry_if_exception(lambda e: isinstance(e, StoreUnavailable) and not isinstance(e, StoreCorrupted)),
            reraise=True,
        )
        self._pool = urllib3.PoolManager(retries=False, timeout=_TIMEOUT)

    def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        *,
        good: tuple[int, ...] = (200,),
    ) -> tuple[Response, bytes]:
        """Return the answer to a small request, and its body. `path` is below the repository, or a URL of the registry.

        Raises:
            StoreError: The answer is none of `good`; StoreNotFound for 404.
        """

        def once() -> tuple[Response, bytes]:
            with self._sent(method, self._url(path), headers or {}, body) as response:
                read = response.read(MAX_BYTES + 1)
                if len(read) > MAX_BYTES:
                    raise too_large(f"{self._where}: the registry's answer", MAX_BYTES)
                response.release_conn()  # all of it is read: the connection can be used again
                if response.status not in good:
                    raise self._error(response.status, method, read)
                return response, read

        return self._policy(once)

    def upload(self, digest: str, size: int, body: Body) -> None:
        """Upload a blob of `size` bytes, from its start if the connection breaks off."""

        def once() -> None:
            begun, _ = self.ask("POST", "blobs/uploads/", {"Content-Length": "0"}, b"", good=(202,))
            place = begun.headers.get("Location", "")
            url = self._url(f"{place}{'&' if '?' in place else '?'}{urlencode({'digest': digest})}")
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            with self._sent("PUT", url, headers, body) as response:
                if response.status != 201:
                    raise self._error(response.status, "PUT", response.read(MAX_BYTES))

        self._policy(once)

    def blob(self, digest: str, start: int, size: int) -> Iterator[bytes]:
        """Yield `size` bytes of a blob from offset `start`. A connection that breaks off raises StoreUnavailable."""
        headers = {"Range": f"bytes={start}-{start + size - 1}"}
        with self._sent("GET", self._url(f"blobs/{digest}"), headers, None) as response:
            if response.status not in (200, 206):
                raise self._error(response.status, "GET", response.read(MAX_BYTES))
            skip = start if response.status == 200 else 0
            for chunk in response.stream(CHUNK_BYTES):
                kept = chunk[skip:]
                skip = max(0, skip - len(chunk))
                yield kept[:size]
                size -= len(kept)
                if size <= 0:
                    return
        raise StoreUnavailable(f"{self._where}: the connection broke off before the end of {digest}")

    def _url(self, path: str) -> str:
        """Return the URL of `path`; of one that the registry gave, only if it is its own."""
        url = urljoin(f"{self.base}/", path)
        if urlsplit(url)[:2] != urlsplit(self.base)[:2]:
            raise StoreMisconfigured(f"{self._where}: the registry sends uploads to {origin(url)}, another server")
        return url

    @contextmanager
    def _sent(self, method: str, url: str, headers: Mapping[str, str], body: bytes | Body | None) -> Iterator[Response]:
        """Send a request, log in if the registry asks for it, follow it where blobs are kept, and yield the answer."""
        with self._explained():
            response = self._once(method, url, headers, body)
            if response.status == 401 and (challenge := response.headers.get("WWW-Authenticate")):
                response.close()
                self._authorize(challenge)
                response = self._once(method, url, headers, body)
            for _ in range(_REDIRECTS):
                target = response.headers.get("Location") if response.status in (301, 302, 303, 307, 308) else None
                if target is None or method not in ("GET", "HEAD"):
                    break
                response.close()
                url = urljoin(url, target)
                if urlsplit(url).scheme not in ("https", urlsplit(self.base).scheme):
                    raise StoreMisconfigured(f"{self._where}: the registry leads from https to {origin(url)}")
                response = self._once(method, url, headers, None)
            try:
                yield response
            finally:
                response.close()

    def _once(self, method: str, url: str, headers: Mapping[str, str], body: bytes | Body | None) -> Response:
        own = urlsplit(url)[:2] == urlsplit(self.base)[:2]  # the token is for the registry alone
        sent = dict(headers) | ({"Authorization": self._authorization} if own and self._authorization else {})
        content = body() if callable(body) else body
        return self._pool.request(
            method, url, headers=sent, body=content, preload_content=False, redirect=False, decode_content=False
        )

    def _authorize(self, challenge: str) -> None:
        """Answer the registry's challenge: with user and password, or with a token for them."""
        kind, _, rest = challenge.partition(" ")
        if kind.lower() == "basic" and self._login:
            self._authorization = urllib3.make_headers(basic_auth=":".join(self._login))["authorization"]
            return
        asked = dict(_CHALLENGE.findall(rest))
        if kind.lower() != "bearer" or "realm" not in asked:
            return
        realm = asked.pop("realm")
        if urlsplit(realm).scheme != "https" and not self.base.startswith("http://"):
            raise StoreMisconfigured(f"{self._where}: the registry sends its users to {origin(realm)} without https")
        if problem := endpoints.refusal(realm):
            raise StoreMisconfigured(f"{self._where}: the registry's own server for tokens: {problem}")
        query = {"service": asked.get("service", ""), "scope": asked.get("scope", "")}
        headers = urllib3.make_headers(basic_auth=":".join(self._login)) if self._login else {}
        url = f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}"
        answer = self._pool.request("GET", url, headers=headers, preload_content=False, redirect=False)
        read = answer.read(MAX_BYTES)
        answer.release_conn()
        if answer.status != 200:
            raise self._error(answer.status, "GET", read)
        try:
            found: dict[str, Any] = json.loads(read)
            token = str(found.get("token") or found["access_token"])
        except (ValueError, KeyError, AttributeError, RecursionError):
            raise StoreUnavailable(f"{self._where}: the registry's server for tokens gives none") from None
        redact.remember(token)
        self._authorization = f"Bearer {token}"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except urllib3.exceptions.HTTPError as error:
            raise StoreUnavailable(
                f"{self._where}: the registry does not answer ({type(error).__name__}): check its name and"
                f" {self._network}"
            ) from None
        except ValueError as error:
            raise StoreUnavailable(f"{self._where}: the registry's answer cannot be read ({error})") from None

    def _error(self, status: int, method: str, body: bytes) -> StoreError:
        """Return what an answer means, with the code that the registry gives."""
        code = ""
        with suppress(ValueError, KeyError, IndexError, TypeError, RecursionError):
            code = str(json.loads(body)["errors"][0]["code"])[:40]
        said = f"HTTP {status}{f', {code}' if code.isprintable() and code else ''}"
        if status in (401, 403):
            to = "read" if method in ("GET", "HEAD") else "write"
            hint = f"check the registry's user and password {self._where_set}"
            return StoreAccessDenied(f"{self._where}: access to {to} is denied ({said}): {hint}")
        if status == 404:
            return StoreNotFound(f"{self._where}: not found ({said})")
        if status in (400, 405, 413):
            return StoreMisconfigured(f"{self._where}: the registry refuses it ({said})")
        return StoreUnavailable(f"{self._where}: the registry keeps failing ({said})")
