"""Read, list and verify the manifest.json of a folder in a store."""

import hashlib
from pathlib import PurePosixPath
from typing import Final, Protocol

from pydantic import ValidationError

from finetune_api import constants
from finetune_api.artifact_manifest import FileRecord, StoreManifest
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.digest import Digest
from finetune_trainer.stores.errors import StoreCorrupted, StoreNotFound

#: Reads before content counts as wrong: without a checksum of the server it may have changed on the way.
READS: Final = 3


def records(digests: dict[str, Digest]) -> list[FileRecord]:
    """Return the manifest's list of files, sorted by path."""
    return [FileRecord(path=path, size_bytes=each.size, sha256=each.sha256) for path, each in sorted(digests.items())]


def read(store: Store, folder: str = "") -> tuple[StoreManifest, bytes] | None:
    """Return the manifest in `folder` and its bytes, or None; raises StoreCorrupted if it is no manifest of ours."""
    path = manifest_path(folder)
    problem = ""
    for _ in range(READS):
        try:
            data = store.read_bytes(path)
        except StoreNotFound:
            if store.exists(path):  # raises when it is the bucket that is missing
                raise
            return None
        try:
            return StoreManifest.model_validate_json(data), data
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"{'.'.join(str(part) for part in first['loc']) or 'text'}: {first['msg']}"
    raise StoreCorrupted(f"{store.field}: {store.uri_of(path)} is no manifest of ours: {problem}")


def digest_of(data: bytes) -> str:
    """Return the digest of a publication, whose manifest's bytes are `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def manifest_path(folder: str) -> str:
    """Return the path of the manifest of `folder`."""
    return str(PurePosixPath(folder, constants.MANIFEST_FILE))


def verify(store: Store, manifest: StoreManifest, folder: str = "") -> None:
    """Read every file back and compare; raises StoreCorrupted for the first that is missing or differs."""
    for file in manifest.files:
        path = str(PurePosixPath(folder, file.path))
        try:
            found = [_read_digest(store, path)]
            while found[-1] != (file.size_bytes, file.sha256) and len(found) < READS:
                found.append(_read_digest(store, path))
        except StoreNotFound:
            raise StoreCorrupted(f"{store.field}: {store.uri_of(path)} is missing") from None
        if found[-1] != (file.size_bytes, file.sha256):
            raise StoreCorrupted(
                f"{store.field}: {store.uri_of(path)} has SHA-256 {found[-1][1]}, the manifest says {file.sha256}"
            )


def _read_digest(store: Store, path: str) -> tuple[int, str]:
    digest = store.digest(path)
    return digest.size, digest.sha256


class Job(Protocol):
    """Whose adapter it is: finetune_api.spec.Metadata, for one."""

    @property
    def namespace(self) -> str | None: ...
    @property
    def name(self) -> str: ...
    @property
    def uid(self) -> str | None: ...
