"""Fetch hf:// sources with huggingface_hub and its cache, which jobs may share: it locks each file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx2
import huggingface_hub
from huggingface_hub import constants, file_download
from huggingface_hub import errors as hub
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tqdm.auto import tqdm

from finetune_api.constants import ENV_ALLOWED_ENDPOINTS
from finetune_api.uri import Uri
from finetune_trainer.errors import TrainerError
from finetune_trainer.stores import certificates, endpoints, patience
from finetune_trainer.stores.base import OnProgress
from finetune_trainer.stores.credentials import Credentials, origin
from finetune_trainer.stores.errors import (
    StoreAccessDenied,
    StoreError,
    StoreMisconfigured,
    StoreNotFound,
    StoreUnavailable,
)
from finetune_trainer.stores.hub_answers import ANSWER_SECONDS, ForbiddenDetour, UnsafeAnswer, checked_client
from finetune_trainer.stores.hub_files import bounded_http_get

huggingface_hub.set_client_factory(checked_client)
file_download.http_get = bounded_http_get

#: Tries while the hub does not answer.
ATTEMPTS: Final = 3
HUB: Final = "https://huggingface.co"
#: Names the file of certificates that the hub's client trusts.
_CA_BUNDLE: Final = "SSL_CERT_FILE"


def fetch_from_hub(
    uri: Uri,
    credentials: Credentials,
    cache: Path,
    on_progress: OnProgress | None = None,
    *,
    revision: str | None = None,
    ignore: Sequence[str] = (),
    field: str | None = None,
    attempts: int = ATTEMPTS,
) -> Path:
    """Fetch a repository's snapshot and return its folder, or the file or folder `uri.path` inside it.

    $HF_ENDPOINT and $HF_TOKEN of the role are honored. Without a connection, a snapshot that is complete in the cache
    is used. For the arguments see fetch.fetch.

    Raises:
        StoreError: The repository, revision or path does not exist, access is denied, or the hub does not answer.
    """
    field = field or ("dataset.train" if uri.is_dataset else "model.source")
    policy = Retrying(
        stop=stop_after_attempt(attempts),
        wait=wait_random_exponential(multiplier=0.5, max=5),
        retry=retry_if_exception_type(StoreUnavailable),
        reraise=True,
    )
    endpoint = shown_endpoint(credentials, field)
    if refusal := endpoints.refusal(endpoint):
        raise StoreMisconfigured(f"{field}: {uri}: HF_ENDPOINT {refusal}")
    where = f"{field}: {uri} at {endpoint}"
    if endpoint != HUB:  # a mirror must not answer for the hub, nor for another mirror
        cache = cache / "mirrors" / endpoint.replace("://", "-").replace(":", "-")
    forbid_detours()
    with patience.waiting_for(f"the hub at {endpoint}", attempts * ANSWER_SECONDS):
        folder = policy(_snapshot, uri, credentials, cache, on_progress, revision, ignore, where)
    found = folder / uri.path if uri.path else folder
    if not found.exists():
        raise StoreNotFound(f"{field}: the repository {uri.authority} has no {uri.path!r} at {revision or 'main'}")
    return found


def _snapshot(
    uri: Uri,
    credentials: Credentials,
    cache: Path,
    on_progress: OnProgress | None,
    revision: str | None,
    ignore: Sequence[str],
    where: str,
) -> Path:
    path = uri.path.rstrip("/")
    try:
        folder = huggingface_hub.snapshot_download(
            uri.authority,
            repo_type="dataset" if uri.is_dataset else "model",
            revision=revision,
            cache_dir=cache,
            endpoint=credentials.get("HF_ENDPOINT"),
            token=credentials.get("HF_TOKEN"),
            allow_patterns=[path, f"{path}/*"] if path else None,
            ignore_patterns=list(ignore) or None,
            tqdm_class=_reporting(on_progress),
        )
    except TrainerError:
        raise
    except Exception as error:  # the library takes an answer for what it should be, so anything can go wrong
        raise explain(error, where, credentials, revision) from error
    return Path(folder)


def forbid_detours() -> None:
    """Where an administrator says who may be asked, take files over HTTP: Xet's client asks whom a hub names."""
    constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET or bool(os.environ.get(ENV_ALLOWED_ENDPOINTS))


def shown_endpoint(credentials: Credentials, field: str) -> str:
    """Return scheme, host and port. Never show what is no URL: it may be a token under the wrong name."""
    try:
        return origin(credentials.get("HF_ENDPOINT") or constants.ENDPOINT)
    except ValueError:
        raise StoreMisconfigured(
            f"{field}: HF_ENDPOINT must be http://host:port or https://host ({credentials.where})"
        ) from None


def explain(error: Exception, where: str, credentials: Credentials, revision: str | None) -> StoreError:
    """Return what an error of the hub's client means for the user."""
    where_set = credentials.where
    status = _status(error)
    if isinstance(error, ForbiddenDetour):
        return StoreMisconfigured(f"{where}: the hub keeps this elsewhere: {error}")
    if isinstance(error, UnsafeAnswer):
        return StoreMisconfigured(f"{where}: the hub's answer is refused: {error}: check HF_ENDPOINT {where_set}")
    if isinstance(error, hub.GatedRepoError):
        if credentials.get("HF_TOKEN"):
            return StoreAccessDenied(
                f"{where} is gated, and the account of the HF_TOKEN {where_set} may not read it: accept its terms on"
                " the hub with that account"
            )
        return StoreAccessDenied(
            f"{where} is gated: accept its terms on the hub, and set HF_TOKEN of that account {where_set}"
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return StoreNotFound(f"{where} has no revision {revision or 'main'!r}")
    if isinstance(error, hub.RepositoryNotFoundError):
        if credentials.get("HF_TOKEN"):
            return StoreNotFound(f"{where} does not exist, or the HF_TOKEN {where_set} may not see it")
        return StoreAccessDenied(f"{where} does not exist, or is private: check the name, or set HF_TOKEN {where_set}")
    if status in (401, 403):
        return StoreAccessDenied(f"{where}: access denied (HTTP {status}): check HF_TOKEN {where_set}")
    if isinstance(error, hub.HFValidationError | hub.RemoteEntryNotFoundError):
        return StoreNotFound(f"{where} cannot be read: {str(error).splitlines()[0]}")
    bundle = os.environ.get(_CA_BUNDLE)
    if isinstance(error, OSError) and bundle and (fault := certificates.fault_of(bundle)):
        return StoreMisconfigured(f"{where}: {_CA_BUNDLE} must be {fault} (in the environment)")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, hub.EntryNotFoundError):
        return StoreUnavailable(f"{where} cannot be fetched: {os.strerror(error.errno)}")
    if status:
        return StoreUnavailable(f"{where}: the hub keeps answering HTTP {status}")
    if isinstance(error, OSError | hub.RevisionResolutionError | hub.XetDownloadError | httpx2.NetworkError):
        return StoreUnavailable(f"{where}: the hub does not answer: check HF_ENDPOINT, {credentials.network}")
    if isinstance(error, httpx2.TimeoutException):
        return StoreUnavailable(f"{where}: the hub does not answer in time: check HF_ENDPOINT, {credentials.network}")
    return StoreUnavailable(
        f"{where}: the hub's answer cannot be read ({type(error).__name__}): check HF_ENDPOINT {where_set}"
    )


def _status(error: BaseException | None) -> int:
    """Return the HTTP status behind `error`, or 0."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return 0


def _reporting(on_progress: OnProgress | None) -> type[Any]:
    """Return the class of a silent progress bar that reports bytes."""

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts = options.get("unit") == "B" and "Reconstruct" in str(options.get("desc", ""))
            options.pop("name", None)
            super().__init__(*args, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            if self._counts and on_progress is not None and n:
                on_progress(int(n))

    return Bar
