"""manifest.json: what a published adapter or a checkpoint consists of. It is written last, so where it is, all is."""

from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, field_validator

from finetune_api import constants
from finetune_api.status import Count, StatusModel
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.digest import Digest
from finetune_trainer.stores.errors import StoreCorrupted, StoreNotFound
from finetune_trainer.stores.json_numbers import drop_non_finite

SCHEMA_VERSION: Final = 1
#: Reads before content counts as wrong: from a server that reports no checksum it may have changed on the way.
READS: Final = 3


class FileRecord(StatusModel):
    """One file below the manifest's folder."""

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    size_bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("path")
    @classmethod
    def _stay_inside(cls, path: str) -> str:
        if not is_safe(path) or path == constants.MANIFEST_FILE:
            raise ValueError(f"{path!r} is no path below the manifest's folder")
        return path


class JobReference(StatusModel):
    """The job a publication belongs to; a local run has no uid."""

    namespace: str | None = None
    name: str = ""
    uid: str | None = None


class StoreManifest(StatusModel):
    """The fields of both kinds; those that do not apply are absent."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["Adapter", "Checkpoint"]
    job: JobReference | None = None
    created_at: datetime
    base_model: str | None = None
    base_commit: str | None = None
    rank: Count | None = None
    step: Count | None = None
    files: Annotated[list[FileRecord], Field(min_length=1)]
    metrics: dict[str, float] | None = None

    @field_validator("metrics", mode="before")
    @classmethod
    def _drop_what_json_cannot_carry(cls, metrics: Any) -> Any:
        return drop_non_finite(metrics) if isinstance(metrics, dict) else metrics

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, the manifest not counted."""
        return sum(file.size_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """The JSON text as stored; its SHA-256 is the publication's digest."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=2).encode() + b"\n"


def is_safe(path: str) -> bool:
    """Whether a path from a store can only lead below the folder it is joined to."""
    parts = path.split("/")
    return bool(path) and "\\" not in path and "\0" not in path and all(part not in ("", ".", "..") for part in parts)


def records(digests: dict[str, Digest]) -> list[FileRecord]:
    """The manifest's list of files, sorted by path."""
    return [FileRecord(path=path, size_bytes=each.size, sha256=each.sha256) for path, each in sorted(digests.items())]


def read(store: Store, folder: str = "") -> tuple[StoreManifest, bytes] | None:
    """The manifest in `folder` and its bytes; None when there is none. Raises StoreCorrupted when it is no manifest."""
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


def manifest_path(folder: str) -> str:
    """Where `folder`'s manifest is."""
    return str(PurePosixPath(folder, constants.MANIFEST_FILE))


def verify(store: Store, manifest: StoreManifest, folder: str = "") -> None:
    """Read every file through and compare; raises StoreCorrupted naming the first that is missing or differs."""
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
