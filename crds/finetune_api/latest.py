"""The latest.json of a prefix: which of the adapters below it readers of the prefix get, and which they got before."""

from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from finetune_api.artifact_manifest import fault_of_name
from finetune_api.status import StatusModel, Time

LATEST_FILE: Final = "latest.json"
#: Earlier adapters that are remembered.
MAX_HISTORY: Final = 50


class Promotion(StatusModel):
    """One adapter that was promoted."""

    path: Annotated[str, Field(max_length=1024)]
    """Its folder, below the prefix."""
    manifest_digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    """sha256:<hex> of its manifest.json."""
    promoted_at: Time
    """When the pointer was moved to it."""

    @field_validator("path")
    @classmethod
    def _lies_below(cls, path: str) -> str:
        if fault := fault_of_name(path):
            raise ValueError(f"{path!r} is no folder below the prefix: it {fault}")
        return path


class Latest(StatusModel):
    """The pointer. Publications it names hold the digest of every file, so the digest here pins all of them."""

    schema_version: Literal[1] = 1
    kind: Literal["Latest"] = "Latest"
    current: Promotion
    """What readers of the prefix get."""
    history: Annotated[list[Promotion], Field(max_length=MAX_HISTORY)] = []
    """What they got before, latest first."""

    def promoted(self, new: Promotion) -> "Latest":
        """Return the pointer moved to `new`."""
        return Latest(current=new, history=[self.current, *self.history][:MAX_HISTORY])

    def rolled_back(self) -> "Latest | None":
        """Return the pointer moved back to the adapter before; None if there was none."""
        return Latest(current=self.history[0], history=self.history[1:]) if self.history else None

    def to_bytes(self) -> bytes:
        """Return the JSON text as stored."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=2).encode() + b"\n"
