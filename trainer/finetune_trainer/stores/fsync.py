"""Files that survive a crash of the machine: bytes reach the disk before the name that vouches for them does."""

import os
from contextlib import suppress
from pathlib import Path


def replace(partial: Path, target: Path) -> None:
    """Rename `partial` to `target` once its bytes are on the disk: under its final name a file is whole."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a crash; some network file systems cannot, and need not."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_folders(top: Path) -> None:
    """The same for every folder from `top` downward."""
    for folder, _, _ in os.walk(top):
        sync_folder(Path(folder))
