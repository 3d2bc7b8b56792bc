"""Make files survive a crash of the machine: bytes reach the disk before the name that stands for them."""

import os
from contextlib import suppress
from pathlib import Path


def replace(partial: Path, target: Path) -> None:
    """Flush `partial` to disk, then rename it to `target`: under its final name a file is whole."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)


def sync_folder(folder: Path) -> None:
    """Flush renames in `folder` to disk; some network file systems cannot, and need not."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_folders(top: Path) -> None:
    """Flush renames in `top` and all folders below it."""
    for folder, _, _ in os.walk(top):
        sync_folder(Path(folder))
