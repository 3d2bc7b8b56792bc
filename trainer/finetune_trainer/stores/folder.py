"""A store in a POSIX folder, for file:// and pvc:// (a claim mounted below $FINETUNE_PVC_ROOT)."""

import errno
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from finetune_api import artifact_manifest
from finetune_api.uri import Uri
from finetune_trainer.stores.base import Entry, OnProgress, Store
from finetune_trainer.stores.digest import (
    CHUNK_BYTES,
    Digest,
    digest_chunks,
)
from finetune_trainer.stores.errors import (
    AlreadyExists,
    BucketNotFound,
    LeadsOutside,
    StoreAccessDenied,
    StoreCorrupted,
    StoreError,
    StoreNotFound,
    StoreUnavailable,
    too_large,
)
from finetune_trainer.stores.fsync import sync_folder
from finetune_trainer.stores.tree import Tree

_PARTIAL: Final = re.compile(r"^\..+\.[0-9a-f]{32}\.partial$")
_NO_HARD_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class FolderStore(Store):
    """A folder. Writes go to a hidden temporary file, are flushed to disk and then renamed: whole or not at all."""

    def __init__(self, root: Uri, folder: Path, tree: Tree, field: str, mount: Path | None = None) -> None:
        """`tree` is what `folder` may reach; `mount` the folder that must be there, for a claim."""
        super().__init__(root, field)
        self.local_folder = self._folder = folder
        self._tree = tree
        self._mount = mount

    def exists(self, path: str) -> bool:
        with self._explained(path):
            return self._local(path).is_file()

    def size(self, path: str) -> int:
        with self._explained(path):
            return self._local(path).stat().st_size

    def list(self, prefix: str = "") -> list[Entry]:
        with self._explained(prefix):
            folder = self._local(prefix)
            return sorted(self._walk(folder)) if folder.is_dir() else []

    def read_bytes(self, path: str, limit: int = artifact_manifest.MAX_BYTES) -> bytes:
        with self._explained(path), self._tree.open(self._local(path)) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise too_large(f"{self.field}: {self.uri_of(path)}", limit)
        return data

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        with self._explained(path), self._tree.open(self._local(path)) as file:
            file.seek(start)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def digest(self, path: str) -> Digest:
        with self._explained(path), self._tree.open(self._local(path)) as file:
            return digest_chunks(iter(lambda: file.read(CHUNK_BYTES), b""))

    def write_bytes(self, path: str, data: bytes, if_none_match: bool = False) -> None:
        with self._explained(path):
            target = self._local(path)
            try:
                with _replacing(target, exclusive=if_none_match) as file:
                    file.write(data)
            except FileExistsError:
                if not target.is_file():  # it is a parent that is in the way
                    raise
                if self.read_bytes(path) != data:
                    raise AlreadyExists(f"{self.field}: {self.uri_of(path)} is already there") from None

    def replace_bytes(self, path: str, data: bytes, expected: bytes) -> None:
        # A folder cannot compare and rename in one step: two writers in the same instant are not detected.
        if (found := self.read_bytes(path)) == data:
            return
        if found != expected:
            raise AlreadyExists(f"{self.field}: {self.uri_of(path)} was changed by somebody else meanwhile")
        self.write_bytes(path, data)

    def upload(
        self, local: Path, path: str, on_progress: OnProgress | None = None, digest: Digest | None = None
    ) -> None:
        with self._explained(path), local.open("rb") as file:
            _copy(file, self._local(path), on_progress, self._expecting(path, digest.sha256 if digest else None))

    def download(
        self, path: str, local: Path, on_progress: OnProgress | None = None, sha256: str | None = None
    ) -> None:
        with self._explained(path), self._tree.open(self._local(path)) as file:
            _copy(file, local, on_progress, self._expecting(path, sha256))

    def delete(self, path: str) -> None:
        with self._explained(path):
            target = self._local(path)
            target.unlink(missing_ok=True)
            for folder in target.parents:  # object stores have no empty folders
                is_claim = folder == self._folder and self.root.scheme == "pvc" and not self.root.path
                if is_claim or (folder != self._folder and self._folder not in folder.parents):
                    break
                with suppress(OSError):
                    folder.rmdir()

    def _expecting(self, path: str, sha256: str | None) -> Callable[[Digest], None]:
        """Return a check that raises StoreCorrupted for bytes with another digest than `sha256`."""

        def check(digest: Digest) -> None:
            if sha256 is not None and digest.sha256 != sha256:
                raise StoreCorrupted(f"{self.field}: {self.uri_of(path)} has SHA-256 {digest.sha256}, not {sha256}")

        return check

    def _local(self, path: str) -> Path:
        if path.startswith("/") or any(part in ("..", ".") for part in path.split("/")):
            raise StoreNotFound(f"{self.field}: path {path!r} leads out of {self.root}")
        local = self._folder / path if path else self._folder
        self._tree.check(local)
        return local

    def _walk(self, folder: Path) -> Iterator[Entry]:
        def fail(error: OSError) -> None:
            raise error

        for parent, _, files in os.walk(folder, onerror=fail):
            for name in files:
                file = Path(parent, name)
                if not _PARTIAL.match(name):
                    with suppress(FileNotFoundError, LeadsOutside):  # removed since, or a link that leads nowhere
                        self._tree.check(file)
                        yield Entry(file.relative_to(self._folder).as_posix(), file.stat().st_size)

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        if self._mount is not None and not self._mount.is_dir():
            raise BucketNotFound(
                f"{self.field}: claim {self.root.authority} is not mounted at {self._mount}:"
                " check that the PersistentVolumeClaim exists in the job's namespace"
            )
        try:
            yield
        except OSError as error:
            raise _explain(error, self.field, self.uri_of(path)) from error


def _explain(error: OSError, field: str, uri: str) -> StoreError:
    """Return the store's error for one of the operating system."""
    what = f"{field}: {uri}"
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return StoreNotFound(f"{what} does not exist (or is no file)")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return StoreAccessDenied(f"{what}: {error.strerror}: check the folder's owner and mode, and the pod's fsGroup")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreUnavailable(f"{what}: {error.strerror}: free space or enlarge the volume")
    return StoreUnavailable(f"{what}: {error.strerror or error}")


def _copy(source: IO[bytes], target: Path, on_progress: OnProgress | None, check: Callable[[Digest], None]) -> None:
    """Copy a file; `target` appears only if `check` does not raise."""

    def moved(chunk: bytes) -> None:
        out.write(chunk)
        if on_progress is not None:
            on_progress(len(chunk))

    with _replacing(target) as out:
        check(digest_chunks(iter(lambda: source.read(CHUNK_BYTES), b""), moved))


@contextmanager
def _replacing(target: Path, exclusive: bool = False) -> Iterator[IO[bytes]]:
    """Yield a file that replaces `target` if the block succeeds; if `exclusive`, raise FileExistsError instead."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _place(partial, target, exclusive)
        sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _place(partial: Path, target: Path, exclusive: bool) -> None:
    if not exclusive:
        partial.replace(target)
        return
    try:
        os.link(partial, target)  # unlike rename, fails if the target exists
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if target.exists():  # without hard links, two writers in the same instant are not detected
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        partial.replace(target)
