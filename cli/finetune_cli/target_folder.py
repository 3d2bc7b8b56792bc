"""The user's folder that a download goes to: what may be written there, and in which order.

Files are fetched into a hidden folder inside it and get their names once all of them are whole and checked. Only files
of an earlier download, which its manifest lists, are replaced. No link is followed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from finetune_api import constants
from finetune_cli.errors import CliError

if TYPE_CHECKING:
    from finetune_api.artifact_manifest import FileRecord, StoreManifest

STAGING = ".finetune-download"


class TargetFolder:
    """The folder `root` while the files of one manifest go there; raises CliError for what is in the way.

    Args:
        root: The folder; it is made.
        manifest: What goes there, and `data`, its bytes.
        overwrite: Whether another adapter that was downloaded there may be replaced.
    """

    def __init__(self, root: Path, manifest: StoreManifest, data: bytes, overwrite: bool) -> None:
        self.root = root
        self._staging = root / STAGING
        self._data = data
        self._parts = {file.path: f"{number:05}-{file.sha256}" for number, file in enumerate(manifest.files)}
        with self._explained(root):
            self._is_new = not root.exists()
            root.mkdir(parents=True, exist_ok=True)
            earlier = self._earlier()
            replaceable = _listed(earlier, root) if earlier is not None else set()
            if earlier not in (None, data) and not overwrite:
                raise CliError(f"{root} holds another adapter", hint="choose another folder, or add --overwrite")
            #: The files that are not there yet.
            self.missing = [file for file in manifest.files if not self._is_there(file, file.path in replaceable)]
            self._require_space()

    def part(self, file: FileRecord) -> Path:
        """Return where the bytes of `file` are gathered; those of an interrupted download may be there."""
        part = self._staging / self._parts[file.path]
        with self._explained(part):
            self._make_folder(self._staging)
            if not _is_regular(part):
                part.unlink(missing_ok=True)
        return part

    def place(self) -> None:
        """Give every missing file its name, and write the manifest last. Their parts must be whole and checked."""
        here, earlier = self.root / constants.MANIFEST_FILE, self._staging / constants.MANIFEST_FILE
        with self._explained(self.root):
            self._make_folder(self._staging)
            if _is_regular(here):  # kept, so that after an interruption it is still known whose files these are
                here.replace(earlier)
            for file in self.missing:
                target = self.root / file.path
                for parent in reversed(PurePosixPath(file.path).parents[:-1]):
                    self._make_folder(self.root / parent)
                _require_no_link(target)
                (self._staging / self._parts[file.path]).replace(target)
            new = self._staging / "manifest"
            new.write_bytes(self._data)
            new.replace(here)
            shutil.rmtree(self._staging)

    def discard(self) -> None:
        """Remove what has been fetched, for it is not what it should be."""
        with suppress(OSError):
            for part in self._staging.iterdir():
                if part.name != constants.MANIFEST_FILE:
                    part.unlink()
            self._staging.rmdir()
        if self._is_new:
            with suppress(OSError):
                self.root.rmdir()

    def _earlier(self) -> bytes | None:
        """Return the manifest of what lies there, which an interrupted `place` has set aside."""
        from finetune_api.artifact_manifest import MAX_BYTES

        _require_folder(self._staging)
        for manifest in (self.root / constants.MANIFEST_FILE, self._staging / constants.MANIFEST_FILE):
            _require_no_link(manifest)
            if _is_regular(manifest):
                with manifest.open("rb") as file:
                    return file.read(MAX_BYTES + 1)
        return None

    def _is_there(self, file: FileRecord, is_replaceable: bool) -> bool:
        """Return whether the file is there, whole; refuse what must not be replaced."""
        target = self.root / file.path
        for parent in PurePosixPath(file.path).parents[:-1]:
            _require_folder(self.root / parent)
        _require_no_link(target)
        if not os.path.lexists(target):
            return False
        if _is_regular(target):
            if target.stat().st_size == file.size_bytes and digest_of(target).hexdigest() == file.sha256:
                return True
            if is_replaceable:
                return False
        raise _in_the_way(target)

    def _require_space(self) -> None:
        needed, free = sum(file.size_bytes for file in self.missing), shutil.disk_usage(self.root).free
        if needed > free:
            raise CliError(
                f"the adapter needs {needed / 2**30:,.1f} GiB, {self.root} has {free / 2**30:,.1f} GiB free",
                hint="choose a folder on another disk",
            )

    def _make_folder(self, folder: Path) -> None:
        _require_folder(folder)
        folder.mkdir(exist_ok=True)

    @contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CliError(f"{error.filename or path}: cannot be written: {error.strerror}") from None


def digest_of(path: Path) -> hashlib._Hash:
    """Return the SHA-256 of a file so far."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256")


def _listed(manifest: bytes, root: Path) -> set[str]:
    """Return the files that the manifest in `root` lists; refuse one that is not ours."""
    from finetune_api.artifact_manifest import StoreManifest

    try:
        return {file.path for file in StoreManifest.model_validate_json(manifest).files}
    except ValueError:
        raise _in_the_way(root / constants.MANIFEST_FILE) from None


def _in_the_way(path: Path) -> CliError:
    return CliError(
        f"{path} is in the way: it is from no earlier download, and is never replaced",
        hint="choose another folder, or move it away",
    )


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _require_no_link(path: Path) -> None:
    if path.is_symlink():
        raise CliError(
            f"{path} is a link: nothing is written through links", hint="remove it, or choose another folder"
        )


def _require_folder(path: Path) -> None:
    """Refuse what is there, if it is no folder."""
    _require_no_link(path)
    if path.exists() and not path.is_dir():
        raise CliError(f"{path} is in the way: the adapter has a folder of that name", hint="choose another folder")
