"""Requests of the registry API v2: https://github.com/opencontainers/distribution-spec/blob/main/spec.md."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from finetune_api import constants
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
from finetune_trainer.stores.oci import credentials as registry_settings
from finetune_trainer.stores.oci.proxies import Pools
from finetune_trainer.stores.oci.tokens import TokenRefused, authorization

#: Tries while the registry does not answer.
ATTEMPTS: Final = 4
#: Of an answer that is no blob.
MAX_BYTES: Final = 4 << 20
CHUNK_BYTES: Final = 1 << 20
#: Seconds, doubled each time.
_PAUSE: Final = 0.1
_REDIRECTS: Final = 5
#: Of a blob whose connection breaks off again and again: so much must arrive before it counts as another fault.
_PROGRESS_BYTES: Final = 16 << 20

#: Gives the body anew for each try.
Body = Callable[[], Iterable[bytes]]
Response = urllib3.BaseHTTPResponse


class RegistryClient:
    """Asks one registry about one repository."""

    def __init__(self, registry: str, repository: str, credentials: Credentials, field: str) -> None:
        """Prepare to ask. Makes no request; raises StoreMisconfigured for a registry that is not allowed.

        Args:
            registry: host[:port].
            repository: The repository's name.
            credentials: Of the role that asks.
            field: The manifest's field, for messages.
        """
        scheme = registry_settings.scheme(registry, credentials, field)
        host = "registry-1.docker.io" if registry == "docker.io" else registry
        self.base = f"{scheme}://{host}/v2/{repository}"
        self._where = f"{field}: {registry}/{repository}"
        self._network, self._where_set = credentials.network, registry_settings.where_login_is(credentials)
        if problem := endpoints.refusal(f"{scheme}://{host}"):
            raise StoreMisconfigured(f"{field}: {problem}")
        self._login = registry_settings.login(registry, credentials, field)
        self._authorization = ""
        self._attempts = 1 if os.environ.get(constants.ENV_STORE_PATIENCE) == "0" else ATTEMPTS
        self._policy = Retrying(
            stop=stop_after_attempt(self._attempts),
            wait=wait_random_exponential(multiplier=0.3, max=5),
            retry=retry_if_exception(lambda e: isinstance(e, StoreUnavailable) and not isinstance(e, StoreCorrupted)),
            reraise=True,
        )
        self._pool = Pools(registry_settings.tls(credentials, field))

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
                if len(read) > MAX_BYTES or response.read(1):  # this raises where the body ends before its length
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
        """Yield `size` bytes of a blob from offset `start`. What breaks off is asked for again from where it did.

        Raises:
            StoreError: The registry does not have it, or keeps failing.
        """
        failures, good = 0, 0
        while size:
            try:
                for chunk in self._part(digest, start, size):
                    start, size, good = start + len(chunk), size - len(chunk), good + len(chunk)
                    yield chunk
            except StoreUnavailable as error:
                failures, good = (failures + 1 if good < _PROGRESS_BYTES else 1), 0
                if failures >= self._attempts or isinstance(error, StoreCorrupted):
                    raise
                time.sleep(_PAUSE * 2**failures)

    def _part(self, digest: str, start: int, size: int) -> Iterator[bytes]:
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
        try:
            url = urljoin(f"{self.base}/", path)
            if urlsplit(url)[:2] == urlsplit(self.base)[:2]:
                return url
            shown = origin(url)
        except ValueError:
            shown = "an address that is no http:// or https:// URL"
        raise StoreMisconfigured(f"{self._where}: the registry sends uploads to {shown}, another server")

    @contextmanager
    def _sent(self, method: str, url: str, headers: Mapping[str, str], body: bytes | Body | None) -> Iterator[Response]:
        """Send a request, log in if the registry asks for it, follow it where blobs are kept, and yield the answer."""
        with self._explained():
            response = self._once(method, url, headers, body)
            if response.status == 401 and (challenge := response.headers.get("WWW-Authenticate")):
                response.close()
                self._log_in(challenge)
                response = self._once(method, url, headers, body)
            for _ in range(_REDIRECTS):
                target = response.headers.get("Location") if response.status in (301, 302, 303, 307, 308) else None
                if target is None:
                    break
                response.close()
                url = self._followed(method, urljoin(url, target))
                response = self._once(method, url, headers, None)
            try:
                yield response
            finally:
                response.close()

    def _followed(self, method: str, url: str) -> str:
        """Return where the registry leads, if a request may go there: what is written goes to the registry alone."""
        if method not in ("GET", "HEAD"):
            raise StoreMisconfigured(
                f"{self._where}: the registry answers {method} with a redirect to {origin(url)}: what is pushed is sent"
                " to the registry alone: name the registry where that leads"
            )
        if urlsplit(url).scheme not in ("https", urlsplit(self.base).scheme):
            raise StoreMisconfigured(f"{self._where}: the registry leads from https to {origin(url)}")
        if problem := endpoints.refusal(url):
            raise StoreMisconfigured(f"{self._where}: the registry keeps this elsewhere: {problem}")
        return url

    def _log_in(self, challenge: str) -> None:
        is_secure = self.base.startswith("https://")
        try:
            found = authorization(challenge, self._login, self._pool, self._where, is_secure)
        except TokenRefused as refused:
            raise self._error(refused.status, "GET", refused.body) from None
        self._authorization = found or self._authorization

    def _once(self, method: str, url: str, headers: Mapping[str, str], body: bytes | Body | None) -> Response:
        own = urlsplit(url)[:2] == urlsplit(self.base)[:2]  # the token is for the registry alone
        sent = dict(headers) | ({"Authorization": self._authorization} if own and self._authorization else {})
        content = body() if callable(body) else body
        return self._pool.request(
            method, url, headers=sent, body=content, preload_content=False, redirect=False, decode_content=False
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except urllib3.exceptions.SSLError:
            raise StoreUnavailable(
                f"{self._where}: the TLS connection failed (set {registry_settings.CA_BUNDLE} for a private certificate"
                f" authority, {registry_settings.PLAIN_HTTP}=true for a registry without TLS)"
            ) from None
        except (urllib3.exceptions.ProxyError, urllib3.exceptions.ProxySchemeUnknown):
            raise StoreUnavailable(
                f"{self._where}: the proxy does not lead there: check HTTPS_PROXY and HTTP_PROXY, or name the"
                " registry in NO_PROXY"
            ) from None
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
