"""One small interface to where models, data and adapters live: an S3 bucket, a volume or a folder."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_api.uri import Uri
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.digest import Digest
from finetune_trainer.stores.errors import (
    AlreadyExists,
    BucketNotFound,
    StoreAccessDenied,
    StoreCorrupted,
    StoreError,
    StoreMisconfigured,
    StoreNotFound,
    StoreUnavailable,
)

__all__ = [
    "AlreadyExists",
    "BucketNotFound",
    "Credentials",
    "Entry",
    "OnProgress",
    "Store",
    "StoreAccessDenied",
    "StoreCorrupted",
    "StoreError",
    "StoreMisconfigured",
    "StoreNotFound",
    "StoreUnavailable",
]

#: Called with bytes moved since the last call, from several threads; negative when a part must go again.
OnProgress = Callable[[int], object]


@dataclass(frozen=True, order=True)
class Entry:
    """One object: `path` relative to the store's root, `size` in bytes, `version` changing with the content (or '')."""

    path: str
    size: int
    version: str = ""


class Store(ABC):
    """Everything below one root URI. Paths are relative to it, with '/' between segments.

    Every method raises StoreUnavailable, StoreAccessDenied or BucketNotFound, and StoreNotFound where it reads.
    """

    def __init__(self, root: Uri, field: str) -> None:
        self.root = root
        self.field = field

    def uri_of(self, path: str) -> str:
        """The full URI of `path`, for messages."""
        return str(self.root.join(path)) if path else str(self.root)

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether there is an object at `path` (a prefix alone is none)."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of the object at `path`."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[Entry]:
        """Every object below the folder `prefix`, sorted by path; empty when there is none."""

    @abstractmethod
    def read_bytes(self, path: str) -> bytes:
        """The whole of a small object."""

    @abstractmethod
    def digest(self, path: str) -> Digest:
        """Read an object through, keeping nothing, for its digest."""

    @abstractmethod
    def write_bytes(self, path: str, data: bytes, if_none_match: bool = False) -> None:
        """Create or replace a small object in one step; readers see the old one or the new one, whole.

        With `if_none_match`, raises AlreadyExists when something with other bytes is there. (The same bytes are taken
        for our own first try whose answer was lost.)
        """

    @abstractmethod
    def upload(
        self, local: Path, path: str, on_progress: OnProgress | None = None, digest: Digest | None = None
    ) -> None:
        """Send a file and check that the store holds the same bytes. `digest`, when known, saves reading it again.

        Streamed in parallel parts: memory stays bounded whatever the file's size.
        """

    @abstractmethod
    def download(
        self, path: str, local: Path, on_progress: OnProgress | None = None, sha256: str | None = None
    ) -> None:
        """Fetch an object into `local`, which appears whole or not at all; parents are created.

        Checked against `sha256` (hex) when given, else against the store's own checksum where it has one; raises
        StoreCorrupted.
        """

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove one object; nothing happens when it is not there."""

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object below the folder `prefix`."""
        for entry in self.list(prefix):
            self.delete(entry.path)
