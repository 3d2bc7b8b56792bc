"""Read and move the latest.json of a prefix, and find the adapter that it names."""

from dataclasses import dataclass

from pydantic import ValidationError

from finetune_api.artifact_manifest import StoreManifest
from finetune_api.latest import LATEST_FILE, Latest
from finetune_trainer.stores import manifest as store_manifest
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.errors import StoreCorrupted, StoreNotFound


@dataclass(frozen=True)
class Found:
    """A publication: `path` is its folder below the store's root, '' if it lies at the root itself."""

    path: str
    manifest: StoreManifest
    data: bytes


def find(store: Store) -> Found | None:
    """Return what was published at the store's root, else what the latest.json there names; None if there is neither.

    A pointer leads to an adapter, never to another pointer. Everything is read through `store`, so nothing outside its
    root is.

    Raises:
        StoreCorrupted: The pointer or the manifest cannot be read, or the adapter is not the one that was promoted.
    """
    if found := store_manifest.read(store):
        return Found("", *found)
    if (pointer := read(store)) is None:
        return None
    current = pointer[0].current
    subject = f"{store.field}: {store.uri_of(LATEST_FILE)} names {current.path}"
    if (named := store_manifest.read(store, current.path)) is None:
        raise StoreCorrupted(f"{subject}, which holds no adapter of its own")
    if (digest := store_manifest.digest_of(named[1])) != current.manifest_digest:
        raise StoreCorrupted(f"{subject}, whose manifest is {digest}: {current.manifest_digest} was promoted")
    return Found(current.path, *named)


def read(store: Store) -> tuple[Latest, bytes] | None:
    """Return the pointer and its bytes; None if there is none. Raises StoreCorrupted."""
    try:
        data = store.read_bytes(LATEST_FILE)
    except StoreNotFound:
        if store.exists(LATEST_FILE):  # raises when it is the bucket that is missing
            raise
        return None
    try:
        return Latest.model_validate_json(data), data
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "text"
        raise StoreCorrupted(
            f"{store.field}: {store.uri_of(LATEST_FILE)} is no pointer of ours: {where}: {first['msg']}"
        ) from None


def move(store: Store, new: Latest, before: bytes | None) -> None:
    """Write the pointer, if it still holds `before` (None: if there is none).

    Raises:
        AlreadyExists: Somebody else moved it meanwhile.
    """
    if before is None:
        store.write_bytes(LATEST_FILE, new.to_bytes(), if_none_match=True)
    else:
        store.replace_bytes(LATEST_FILE, new.to_bytes(), before)
