"""What can go wrong with a store, by what the user must do about it. Messages name the URI, never a key."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from finetune_api.exit_codes import ExitCode


class StoreError(Exception):
    """Base of all of them; `exit_code` is what the trainer ends with when nobody handles it."""

    exit_code: ClassVar[ExitCode] = ExitCode.UNAVAILABLE


class StoreUnavailable(StoreError):
    """The store did not answer, kept answering with server errors, or is full. Worth another attempt later."""


class StoreCorrupted(StoreUnavailable):
    """Bytes in the store, or on the way from it, are not the ones that were put there."""


class StoreAccessDenied(StoreError):
    """Missing or wrong credentials, or not allowed to touch this path."""

    exit_code = ExitCode.ACCESS_DENIED


class StoreMisconfigured(StoreError):
    """A setting of the store that can never work, such as an endpoint that is no URL."""

    exit_code = ExitCode.CONFIG_INVALID


class StoreNotFound(StoreError):
    """The object or folder is not there."""

    exit_code = ExitCode.CONFIG_INVALID


class BucketNotFound(StoreNotFound):
    """The bucket, claim or disk itself is not there: the manifest or the cluster must change."""


class AlreadyExists(StoreError):
    """Something else is where we were asked to create."""

    exit_code = ExitCode.CONFIG_INVALID


@contextmanager
def on_local_disk(what: str, folder: Path) -> Iterator[None]:
    """Turn local trouble while `what` is written to `folder` (full, read-only, …) into StoreUnavailable."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"{what} cannot be written to {folder}: {error.strerror or error}") from error
