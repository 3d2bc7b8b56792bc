"""The pointer of a prefix, for `finetune promote` and `finetune rollback`: what it may name, and how it is moved."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from finetune_api import constants
from finetune_cli import storage
from finetune_cli.errors import CliError, Exit

if TYPE_CHECKING:
    from finetune_api.latest import Latest, Promotion
    from finetune_trainer.stores.base import Store


def default_prefix(address: str) -> str:
    """Return the folder above an adapter; above its output.uri for one that is kept below candidates/.

    Raises CliError where nothing is above it.
    """
    scheme, separator, place = address.rstrip("/").rpartition("://")
    parts = place.split("/")
    if len(parts) > 2 and parts[-2] == constants.CANDIDATES_DIR:
        parts = parts[:-2]
    if not (above := "/".join(parts[:-1])):
        raise CliError(
            f"{address}: no folder is above this adapter, and a pointer belongs there",
            hint="publish to a folder of the bucket, or name a --prefix",
        )
    return f"{scheme}{separator}{above}"


def path_below(prefix: str, address: str) -> str:
    """Return the path of an adapter below `prefix`. Raises CliError if it lies elsewhere."""
    folder = f"{prefix.rstrip('/')}/"
    if not address.startswith(folder) or not (path := address.removeprefix(folder).strip("/")):
        raise CliError(f"{address} does not lie below {prefix}, and a pointer names only what does")
    from finetune_api.artifact_manifest import fault_of_name

    if fault := fault_of_name(path):
        raise CliError(f"{address} cannot be promoted: its path below {prefix} {fault}")
    return path


def read(store: Store) -> tuple[Latest, bytes] | None:
    """Return the pointer of a prefix and its bytes; None if it has none. Raises CliError."""
    from finetune_trainer.stores import latest, manifest

    with storage.store_errors():
        if manifest.read(store) is not None:
            raise CliError(
                f"{store.root} holds an adapter of its own, which its readers get: a pointer belongs in the folder"
                " above adapters"
            )
        return latest.read(store)


def checked(store: Store, path: str, digest: str | None = None) -> Promotion:
    """Return the promotion of the adapter at `path`, once its signature and all of its files are compared.

    Args:
        store: The prefix.
        path: The adapter's folder below it.
        digest: What its manifest must be; None takes it as it is.

    Raises:
        CliError: There is no adapter, or it is not what it should be.
    """
    from finetune_api.latest import Promotion
    from finetune_trainer.stores import manifest
    from finetune_trainer.stores.signature import require_signature

    address = store.uri_of(path)
    with storage.store_errors():
        if (found := manifest.read(store, path)) is None or found[0].kind != "Adapter":
            what = f"a {found[0].kind}" if found else "none"
            raise CliError(f"a pointer names a published adapter, and {address} holds {what}")
        if digest and manifest.digest_of(found[1]) != digest:
            raise CliError(f"{address} no longer holds the adapter that was promoted", code=Exit.CORRUPT)
        require_signature(found[1], store.uri_of(f"{path}/{constants.MANIFEST_FILE}"), os.environ)
        manifest.verify(store, found[0], path)
    return Promotion(path=path, manifest_digest=manifest.digest_of(found[1]), promoted_at=datetime.now(UTC))


def move(store: Store, new: Latest, before: bytes | None) -> str:
    """Write the pointer if nobody moved it since it was read; return what cannot be promised. Raises CliError."""
    from finetune_api.latest import LATEST_FILE
    from finetune_trainer.stores import latest
    from finetune_trainer.stores.errors import AlreadyExists

    with storage.store_errors():
        is_safe = store.honors_conditions(LATEST_FILE)
        try:
            latest.move(store, new, before)
        except AlreadyExists:
            hint = "look with finetune rollback --list, then run it again"
            raise CliError(f"somebody else moved the pointer of {store.root} meanwhile", hint=hint) from None
    if is_safe:
        return ""
    return (
        f"The store of {store.root} ignores If-Match: if somebody else moves this pointer in the same moment,"
        " one of the two moves is lost"
    )
