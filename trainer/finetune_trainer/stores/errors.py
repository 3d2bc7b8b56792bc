"""What can go wrong with a store, by what the user must do about it. Messages name the URI, never a key."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_api.exit_codes import ExitCode
from finetune_trainer.errors import TrainerError


class StoreError(TrainerError):
    """Base of all errors of a store."""

    exit_code = ExitCode.UNAVAILABLE


class StoreUnavailable(StoreError):
    """The store did not answer, kept answering with server errors, or is full. Worth another attempt later."""


class StoreCorrupted(StoreUnavailable):
    """Bytes in the store, or on the way from it, differ from those that were written."""


def too_large(subject: str, limit: int) -> StoreCorrupted:
    """Return the error for an object of which no more than `limit` bytes are read."""
    return StoreCorrupted(f"{subject} has more than {limit / 2**20:g} MiB: it cannot be what it should be")


class StoreAccessDenied(StoreError):
    """Credentials are missing or wrong, or do not allow access to this path."""

    exit_code = ExitCode.ACCESS_DENIED


class StoreMisconfigured(StoreError):
    """A setting of the store can never work, such as an endpoint that is no URL."""

    exit_code = ExitCode.CONFIG_INVALID


class StoreNotFound(StoreError):
    """The object or folder does not exist."""

    exit_code = ExitCode.CONFIG_INVALID


class LeadsOutside(StoreError):
    """A symbolic link leads out of the folder or claim that the manifest names."""

    exit_code = ExitCode.CONFIG_INVALID


class BucketNotFound(StoreNotFound):
    """The bucket, claim or disk itself does not exist: the manifest or the cluster must change."""


class AlreadyExists(StoreError):
    """A path that should be created is already taken by something else."""

    exit_code = ExitCode.CONFIG_INVALID


@contextmanager
def on_local_disk(subject: str, folder: Path) -> Iterator[None]:
    """Turn an OSError while `subject` is written to `folder` (full, read-only, …) into StoreUnavailable."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"{subject} cannot be written to {folder}: {error.strerror or error}") from error
