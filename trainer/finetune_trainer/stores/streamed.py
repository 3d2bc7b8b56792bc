"""A store whose objects can be listed and streamed: the rest of reading follows from that."""

from abc import abstractmethod
from pathlib import Path

from finetune_api import artifact_manifest
from finetune_trainer.stores import fsync
from finetune_trainer.stores.base import Entry, OnProgress, Store
from finetune_trainer.stores.digest import Digest, digest_chunks
from finetune_trainer.stores.errors import StoreCorrupted, StoreMisconfigured, StoreNotFound, on_local_disk, too_large


class StreamedStore(Store):
    """Reads objects by `entries` and `stream`."""

    @abstractmethod
    def entries(self) -> list[Entry]:
        """Return every object, in any order; none if the root does not exist."""

    def entry(self, path: str) -> Entry:
        """Return the object at `path`; raises StoreNotFound."""
        found = next((each for each in self.entries() if each.path == path), None)
        if found is None:
            raise StoreNotFound(f"{self.field}: {self.uri_of(path)} does not exist")
        return found

    def exists(self, path: str) -> bool:
        return any(each.path == path for each in self.entries())

    def size(self, path: str) -> int:
        return self.entry(path).size

    def list(self, prefix: str = "") -> list[Entry]:
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        return sorted(each for each in self.entries() if each.path.startswith(folder))

    def read_bytes(self, path: str, limit: int = artifact_manifest.MAX_BYTES) -> bytes:
        read = bytearray()
        for chunk in self.stream(path):
            read += chunk
            if len(read) > limit:
                raise too_large(f"{self.field}: {self.uri_of(path)}", limit)
        return bytes(read)

    def replace_bytes(self, path: str, data: bytes, expected: bytes) -> None:
        """Refuse: what is here are versions, each whole, and nothing points from one to another."""
        raise StoreMisconfigured(f"{self.field}: {self.root} cannot hold {path}: name a tag or a repository of its own")

    def digest(self, path: str) -> Digest:
        return digest_chunks(self.stream(path))

    def download(
        self, path: str, local: Path, on_progress: OnProgress | None = None, sha256: str | None = None
    ) -> None:
        partial = local.with_name(f"{local.name}.partial")
        with on_local_disk(f"{self.field}: {self.uri_of(path)}", local.parent):
            local.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:

                def sink(chunk: bytes) -> None:
                    file.write(chunk)
                    if on_progress:
                        on_progress(len(chunk))

                digest = digest_chunks(self.stream(path), sink)
            if sha256 is not None and digest.sha256 != sha256:
                partial.unlink()
                raise StoreCorrupted(f"{self.field}: {self.uri_of(path)} has SHA-256 {digest.sha256}, not {sha256}")
            fsync.replace(partial, local)
