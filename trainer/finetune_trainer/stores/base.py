"""One small interface to where models, data and adapters live: an S3 bucket, a volume or a folder."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune_api import artifact_manifest
from finetune_api.uri import Uri
from finetune_trainer.stores.digest import Digest

#: Called with the bytes moved since the last call, from several threads; negative when a part must be sent again.
OnProgress = Callable[[int], object]


@dataclass(frozen=True, order=True)
class Entry:
    """One object in a listing.

    Attributes:
        path: Relative to the store's root.
        size: Bytes.
        version: Changes with the content; '' if the store knows none.
    """

    path: str
    size: int
    version: str = ""


class Store(ABC):
    """Everything below one root URI. Paths are relative to it, with '/' between segments.

    Every method raises StoreUnavailable, StoreAccessDenied or BucketNotFound; those that read also StoreNotFound.

    Attributes:
        root: The root URI.
        field: The manifest's field that named it, for messages.
        local_folder: The root on this machine, if files can be used in place; fetch() then copies nothing.
    """

    local_folder: Path | None = None

    def __init__(self, root: Uri, field: str) -> None:
        self.root = root
        self.field = field

    def uri_of(self, path: str) -> str:
        """Return the full URI of `path`, for messages."""
        return str(self.root.join(path)) if path else str(self.root)

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Return whether there is an object at `path` (a prefix alone is none)."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Return the size of the object at `path` in bytes."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[Entry]:
        """Return every object below the folder `prefix`, sorted by path; none if it does not exist."""

    @abstractmethod
    def read_bytes(self, path: str, limit: int = artifact_manifest.MAX_BYTES) -> bytes:
        """Return the whole of a small object; raises StoreCorrupted when it has more than `limit` bytes."""

    @abstractmethod
    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of the object at `path` from offset `start`, which must lie before its end.

        A connection that breaks off raises StoreUnavailable: call again with the offset reached.
        """

    @abstractmethod
    def digest(self, path: str) -> Digest:
        """Read an object through without keeping it, and return its digest."""

    @abstractmethod
    def write_bytes(self, path: str, data: bytes, if_none_match: bool = False) -> None:
        """Create or replace a small object in one step: readers see the old one or the new one, whole.

        Args:
            path: Where to write.
            data: The object's bytes.
            if_none_match: Only create it. The same bytes count as our own first try whose answer was lost.

        Raises:
            AlreadyExists: `if_none_match` is set and other bytes are there.
        """

    def check_writable(self, path: str) -> None:
        """Check that files may be written below the root, by one at `path` that is deleted again. Raises StoreError."""
        self.write_bytes(path, b"checks that this job may write here\n")
        self.delete(path)

    def honors_conditions(self, path: str) -> bool:
        """Return whether this store refuses a write to `path` whose condition does not hold: not every server does.

        Where it does not, `write_bytes` with `if_none_match` and `replace_bytes` may undo what somebody else writes in
        the same moment.
        """
        return True

    @abstractmethod
    def replace_bytes(self, path: str, data: bytes, expected: bytes) -> None:
        """Replace a small object in one step, if it holds `expected`; if it holds `data` already, that was our own try.

        Raises:
            AlreadyExists: It holds something else: somebody replaced it meanwhile.
        """

    @abstractmethod
    def upload(
        self, local: Path, path: str, on_progress: OnProgress | None = None, digest: Digest | None = None
    ) -> None:
        """Upload a file in parallel parts, with bounded memory, and check that the store holds the same bytes.

        Args:
            local: The file.
            path: Where to write it.
            on_progress: Told of bytes as they are sent.
            digest: The file's digest if known, which saves reading it again.
        """

    @abstractmethod
    def download(
        self, path: str, local: Path, on_progress: OnProgress | None = None, sha256: str | None = None
    ) -> None:
        """Download an object into a file, which appears whole or not at all.

        Args:
            path: The object.
            local: The file to write; its parents are created.
            on_progress: Told of bytes as they arrive.
            sha256: The expected digest (hex); default: the store's own checksum, where it has one.

        Raises:
            StoreCorrupted: The bytes differ from it.
        """

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete one object; do nothing if it does not exist."""

    def delete_prefix(self, prefix: str) -> None:
        """Delete every object below the folder `prefix`."""
        for entry in self.list(prefix):
            self.delete(entry.path)
