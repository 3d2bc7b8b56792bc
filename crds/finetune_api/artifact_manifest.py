"""The manifest.json of a published adapter or a checkpoint: every file below its folder with size and SHA-256.

Publishers write it last: where it is, the publication is complete.
"""

from datetime import datetime
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from finetune_api import constants
from finetune_api.status import Count, Metrics, StatusModel

SCHEMA_VERSION: Final = 1
#: What a job can publish; the trainer has one module for each (finetune_trainer.publishing.artifacts).
ArtifactKind = Literal["Adapter"]


class FileRecord(StatusModel):
    """One file below the manifest's folder."""

    path: Annotated[str, Field(max_length=1024)]
    size_bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("path")
    @classmethod
    def _stay_inside(cls, path: str) -> str:
        if not is_safe(path) or path == constants.MANIFEST_FILE:
            raise ValueError(f"{path!r} is not a path below the manifest's folder")
        return path


class JobReference(StatusModel):
    """The job that published it; a local run has no uid."""

    namespace: str | None = None
    name: str = ""
    uid: str | None = None


class StoreManifest(StatusModel):
    """An adapter or a checkpoint. Fields that do not apply to its kind are absent."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: ArtifactKind | Literal["Checkpoint"]
    job: JobReference | None = None
    created_at: datetime
    base_model: str | None = None
    base_commit: str | None = None
    rank: Count | None = None
    step: Count | None = None
    files: Annotated[list[FileRecord], Field(min_length=1)]
    metrics: Metrics | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, the manifest not counted."""
        return sum(file.size_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """Return the JSON text as stored; its SHA-256 is the publication's digest."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=2).encode() + b"\n"


def is_safe(path: str) -> bool:
    """Return whether `path`, joined to a folder, stays below that folder."""
    parts = path.split("/")
    return bool(path) and "\\" not in path and "\0" not in path and all(part not in ("", ".", "..") for part in parts)
