"""The manifest.json of a published adapter or a checkpoint: every file below its folder with size and SHA-256.

Publishers write it last: where it is, the publication is complete.
"""

import re
from datetime import datetime
from typing import Annotated, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from finetune_api import constants
from finetune_api.gate import MAX_CHECKS, GateCheck
from finetune_api.plain_text import is_plain_line
from finetune_api.status import Count, Metrics, StatusModel
from finetune_api.uri import MAX_LENGTH as MAX_URI_LENGTH

SCHEMA_VERSION: Final = 1
#: More than any manifest of ours has; readers stop there.
MAX_BYTES: Final = 4 << 20
MAX_FILES: Final = 10_000
#: What a job can publish; the trainer has one module for each (finetune_trainer.publishing.artifacts).
ArtifactKind = Literal["Adapter", "Merged", "Gguf"]


class FileRecord(StatusModel):
    """One file below the manifest's folder."""

    path: Annotated[str, Field(max_length=1024)]
    size_bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("path")
    @classmethod
    def _may_be_written(cls, path: str) -> str:
        if fault := fault_of_name(path):
            raise ValueError(f"{path!r} is no name for a file of ours: it {fault}")
        return path


class JobReference(StatusModel):
    """The job that published it; a local run has no uid."""

    namespace: str | None = None
    name: str = ""
    uid: str | None = None


class Parent(StatusModel):
    """The adapter that training began with (lora.initFrom)."""

    uri: Annotated[str, Field(max_length=MAX_URI_LENGTH)]
    manifest_digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    """sha256:<hex> of its manifest.json, as it was read; absent where it had none of ours."""


class Lineage(StatusModel):
    """What an adapter was made of. The base model's commit stands beside it, the spec in training/job.yaml."""

    code_version: Annotated[str, Field(max_length=64)] | None = None
    """Version of finetune-operator that trained it."""
    train_rows: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    """Digest of the training rows, as token ids and labels."""
    eval_rows: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    """Digest of the held-out rows, likewise."""
    eval_prompts: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    """Digest of what decides the metrics of generated answers: prompts, right labels, and how answers are made."""
    parent: Parent | None = None


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
    files: Annotated[list[FileRecord], Field(min_length=1, max_length=MAX_FILES)]
    metrics: Metrics | None = None
    lineage: Lineage | None = None
    gate: Annotated[list[GateCheck], Field(min_length=1, max_length=MAX_CHECKS)] | None = None
    """What became of publish.onlyIf. One that is not passed: this is a candidate, not published."""
    signature: Annotated[str, Field(max_length=128)] | None = None

    @model_validator(mode="after")
    def _one_file_for_each_name(self) -> Self:
        """Also where upper and lower case are one: a second file must not replace the first, which was checked."""
        names: set[str] = set()
        for file in self.files:
            name = file.path.casefold()
            if name in names:
                raise ValueError(f"{file.path!r} is listed twice")
            names.add(name)
        for file in self.files:
            name = file.path.casefold()
            if not names.isdisjoint(name[:end] for end, character in enumerate(name) if character == "/"):
                raise ValueError(f"{file.path!r} lies in another file")
        return self

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, the manifest not counted."""
        return sum(file.size_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """Return the JSON text as stored; its SHA-256 is the publication's digest."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=2).encode() + b"\n"


def fault_of_path(path: str) -> str:
    """Return why `path`, which somebody else chose, must not be joined to a folder, as "it …"; empty if it may.

    A path without a fault stays below the folder on every system.
    """
    if not is_plain_line(path):
        return "holds control or invisible characters"
    if "\\" in path or re.match("[A-Za-z]:", path):
        return "holds a backslash or begins with a drive letter"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "is empty, absolute or has an empty, '.' or '..' part"
    return ""


def fault_of_name(path: str) -> str:
    """Return why a manifest must not list `path`, as "it …"; empty if it may.

    Users download into folders of their own, where hidden files configure shells and tools.
    """
    if fault := fault_of_path(path):
        return fault
    if any(part.startswith(".") for part in path.split("/")):
        return "has a part that begins with a dot"
    if ":" in path:
        return "holds a colon"
    return "is the manifest's own name" if path.casefold() == constants.MANIFEST_FILE else ""
