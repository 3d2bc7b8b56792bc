"""The user's stores, opened with the trainer's own clients; what goes wrong there ends the command."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api import constants, uri
from finetune_api.exit_codes import ExitCode
from finetune_cli.errors import CliError, Exit, install_hint
from finetune_cli.text_lines import text_lines

if TYPE_CHECKING:
    from finetune_trainer.errors import TrainerError
    from finetune_trainer.stores.base import Store

#: Seconds to retry a store that is out of reach; a person is waiting. FINETUNE_STORE_PATIENCE sets another value.
OUTAGE_SECONDS = 3
_OUT_OF_REACH = (ExitCode.UNAVAILABLE, ExitCode.ACCESS_DENIED)


def cache_folder(env: Mapping[str, str]) -> Path:
    """Return where models and data sets are kept between runs: the user's cache (XDG base directory rules)."""
    base = env.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "finetune"


def open_store(address: str, *, role: str = "output", subject: str = "adapter", timeout: float | None = None) -> Store:
    """Open the store below `address` with the credentials of the environment. Nothing is contacted yet.

    Args:
        address: An s3://, file://, oci:// or hf:// URI.
        role: The role of the job that the store belongs to (names the manifest's field in messages).
        subject: What messages begin with.
        timeout: Seconds to wait for an answer, without retries; None waits as the trainer does.

    Raises:
        CliError: The address is none that can be read from here, or a library is missing.
    """
    try:
        root = uri.parse(address, (*uri.WRITABLE, *uri.PUSHED))
    except ValueError as error:
        why = uri.cause(address, hub=True)
        raise CliError(f"{uri.redacted(address)}: {error}{f' ({why})' if why else ''}") from None
    if root.scheme == "pvc":
        raise CliError(
            f"{address} is a volume in the cluster, which cannot be read from here",
            hint="mount it in a pod and use kubectl cp, or publish to s3://",
        )
    from finetune_trainer.stores.credentials import Credentials
    from finetune_trainer.stores.open import open_store as open_trainer_store

    env = {constants.ENV_STORE_PATIENCE: str(OUTAGE_SECONDS)} | os.environ
    if timeout is not None:
        env |= {constants.ENV_STORE_PATIENCE: "0", constants.ENV_STORE_TIMEOUT: str(timeout)}
    with store_errors():
        return open_trainer_store(root, Credentials.from_environment(role, env), field=subject)


class TooLargeError(CliError):
    """A text in a store is larger than it can be."""


def read_lines(store: Store, path: str, limit: int) -> Iterator[str]:
    """Yield the lines of a text file in `store`, at most `limit` bytes of them.

    Raises:
        TooLargeError: After those, if there is more.
        StoreError: The file cannot be read.
    """

    def chunks() -> Iterator[bytes]:
        left = limit
        for chunk in store.stream(path):
            yield chunk[:left]
            left -= len(chunk)
            if left < 0:
                raise TooLargeError(f"{store.uri_of(path)} is larger than {limit >> 20} MiB: the rest is not read")

    return text_lines(chunks())


@contextmanager
def told_on_screen() -> Iterator[None]:
    """Let the trainer's stores say on stderr which server they wait for."""
    from typer import echo

    from finetune_trainer.stores import patience

    token = patience.TELL.set(partial(echo, err=True))
    try:
        yield
    finally:
        patience.TELL.reset(token)


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn a store's errors inside the block into CliError, and say of a server that does not answer that we wait."""
    from finetune_trainer.stores.errors import StoreError

    try:
        with told_on_screen():
            yield
    except StoreError as error:
        raise cli_error(error) from None
    except ModuleNotFoundError as error:
        raise CliError(f"{error.name} is not installed here", hint=install_hint("cli")) from None


def cli_error(error: TrainerError) -> CliError:
    """Return the CliError for an error of the trainer's stores or planner."""
    from finetune_trainer.stores.errors import StoreCorrupted

    if isinstance(error, StoreCorrupted):
        return CliError(str(error), code=Exit.CORRUPT)
    return CliError(str(error), code=Exit.UNREACHABLE if error.exit_code in _OUT_OF_REACH else Exit.INVALID)
