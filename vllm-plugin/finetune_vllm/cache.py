"""Verified copies on this machine: a folder for each digest, in a bounded space. None that is in use is removed.

Several processes may share them. The kernel's locks say what is in use, so a process that was killed holds nothing.
"""

import fcntl
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from finetune_trainer.errors import TrainerError
from finetune_trainer.stores import fsync

log = logging.getLogger(__name__)
_COPY: Final = re.compile(r"[0-9a-f]{64}")
#: A copy that is being made: the bytes that are kept free for it stand in its name.
_PARTIAL: Final = re.compile(r"\.[0-9a-f]{64}\.(\d+)\.[0-9a-f]{32}")
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class NotPrivate(TrainerError, ValueError):
    """The folder cannot be made, or another user could change what is in it."""


class Full(TrainerError):
    """What is in use leaves no room."""


@dataclass(frozen=True)
class Copy:
    """A copy in use."""

    folder: Path
    handle: int

    def release(self) -> None:
        """Let it be removed. To be called once."""
        os.close(self.handle)


class Cache:
    """The copies below one folder, which is this user's alone."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Make the folder if need be.

        Args:
            folder: Where copies lie.
            limit: Bytes of all copies together.

        Raises:
            NotPrivate: It cannot be used.
        """
        self._folder, self._limit = folder, limit
        self._require_private()

    def use(self, digest: str) -> Copy | None:
        """Return the copy of that digest, in use from now on; None if there is none."""
        folder = self._folder / digest
        with self._locked():
            if not os.path.lexists(folder):
                return None
            if not _is_folder(folder):
                log.warning("%s is no folder: it is removed", folder)
                _remove(folder)
                return None
            handle = os.open(folder, _FOLDER)
            fcntl.flock(handle, fcntl.LOCK_SH)
            _touch(handle)
            return Copy(folder, handle)

    def add(self, digest: str, size: int, fill: Callable[[Path], object]) -> Copy | None:
        """Make a copy, which appears once all of it is there.

        Args:
            digest: Its name.
            size: Bytes that `fill` writes.
            fill: Fills the folder that it is given.

        Returns:
            The copy, in use; None if another process was first.

        Raises:
            Full: There is no room for it.
        """
        partial, folder = self._folder / f".{digest}.{size}.{uuid.uuid4().hex}", self._folder / digest
        with self._locked():
            self._make_room(size)
            partial.mkdir(mode=0o700)
            handle = os.open(partial, _FOLDER)
            fcntl.flock(handle, fcntl.LOCK_SH)
        try:
            fill(partial)
            fsync.sync_folders(partial)
            with self._locked():
                if not folder.exists():
                    _touch(handle)
                    partial.rename(folder)
                    return Copy(folder, os.dup(handle))  # the lock is the folder's, by whatever name
            return None
        finally:
            try:
                with self._locked():  # nobody looks at it while it goes
                    shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(handle)

    def discard(self, copy: Copy) -> None:
        """Release and remove a copy that is damaged, unless there is another one in its place by now."""
        with self._locked(), suppress(FileNotFoundError):
            if os.path.samestat(copy.folder.lstat(), os.fstat(copy.handle)):
                _remove(copy.folder)
        copy.release()

    def _make_room(self, size: int) -> None:
        """Remove leftovers, then what was used longest ago, until `size` bytes fit; nothing if they cannot."""
        used, unused = 0, []
        for path in self._folder.iterdir():
            if partial := _PARTIAL.fullmatch(path.name):
                if _is_used(path):
                    used += int(partial[1])
                else:
                    _remove(path)
            elif _COPY.fullmatch(path.name):
                if _is_used(path):
                    used += _size(path)
                else:
                    unused.append((path.lstat().st_mtime_ns, path, _size(path)))
        if used + size > self._limit:
            raise Full(
                f"{_gib(size)} more do not fit: copies may take {_gib(self._limit)} (FINETUNE_ADAPTERS_CACHE_GIB), and"
                f" those in use take {_gib(used)}"
            )
        total = used + sum(each for _, _, each in unused)
        for _, path, each in sorted(unused):
            if total + size <= self._limit:
                return
            _remove(path)
            total -= each

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only one who makes, takes or removes copies; for a moment, never while one is filled."""
        self._require_private()
        handle = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _require_private(self) -> None:
        subject = f"FINETUNE_ADAPTERS_CACHE: {self._folder}"
        try:
            for folder in (*reversed(self._folder.parents), self._folder):
                if not folder.exists():  # those above, too: who may write there can put another in its place
                    folder.mkdir(mode=0o700, exist_ok=True)
            found = self._folder.stat()
        except OSError as error:
            raise NotPrivate(f"{subject} cannot be made: {error.strerror}: name a folder that can") from None
        if found.st_uid != os.geteuid():
            raise NotPrivate(
                f"{subject} belongs to another user (uid {found.st_uid}): name a folder below it, which is made for"
                " this user alone"
            )
        if (mode := stat.S_IMODE(found.st_mode)) & (stat.S_IWGRP | stat.S_IWOTH):
            raise NotPrivate(
                f"{subject} can be written by other users (mode {mode:04o}): name a folder below it, which is made for"
                " this user alone"
            )


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_used(path: Path) -> bool:
    if not _is_folder(path):
        return False
    handle = os.open(path, _FOLDER)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _remove(path: Path) -> None:
    """Remove whatever is there; of a copy no half is ever seen under its name."""
    if not _is_folder(path):
        path.unlink(missing_ok=True)
        return
    gone = path.with_name(f".{path.name.lstrip('.')[:64]}.0.{uuid.uuid4().hex}")
    path.rename(gone)
    shutil.rmtree(gone)


def _touch(handle: int) -> None:
    """Say that it was used now: the kernel's own clock does not tell two uses in the same few milliseconds apart."""
    now = time.time_ns()
    os.utime(handle, ns=(now, now))


def _size(path: Path) -> int:
    return sum(Path(parent, name).lstat().st_size for parent, _, names in os.walk(path) for name in names)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
