"""Read weights into the page cache while a run imports, tokenizes and plans: loading then waits for no volume.

What is read is dropped. The kernel keeps it as long as nothing else needs the memory.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

#: Files at the same time, and bytes of one read: a network volume is slow for each, not for all.
_AT_ONCE: Final = 4
_CHUNK: Final = 8 << 20
#: The part of the free memory that may hold what was read: more would push out what is still to be loaded.
_SHARE: Final = 0.5
_MEMINFO: Final = Path("/proc/meminfo")
_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


def read_ahead(files: Sequence[Path], open_file: Callable[[Path], BinaryIO]) -> list[threading.Thread]:
    """Begin to read `files`, in their order, as far as memory goes; nothing that fails here counts.

    Args:
        files: What will be read.
        open_file: Opens one of them.

    Returns:
        Who reads. Nobody need wait for them, and a process that ends does not.
    """
    waiting = deque(_that_fit(files, room()))

    def work() -> None:
        with suppress(IndexError):
            while True:
                _read(waiting.popleft(), open_file)

    readers = [
        threading.Thread(target=work, name="read-ahead", daemon=True) for _ in range(min(_AT_ONCE, len(waiting)))
    ]
    started = []
    with suppress(RuntimeError):  # a pod has a limit of threads, too
        for each in readers:
            each.start()
            started.append(each)
    return started


def room() -> int:
    """Return how many bytes may be read ahead: a part of what this machine, or this container, has left."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) << 10)
    with suppress(OSError, ValueError):  # "max" where there is none
        found.append(int(_LIMIT.read_text()))
    return int(min(found, default=0) * _SHARE)


def _that_fit(files: Iterable[Path], most: int) -> Iterable[Path]:
    for file in files:
        with suppress(OSError):
            most -= file.stat().st_size
        if most < 0:
            return
        yield file


def _read(path: Path, open_file: Callable[[Path], BinaryIO]) -> None:
    with suppress(Exception), open_file(path) as file:
        handle, buffer = file.fileno(), bytearray(_CHUNK)
        for at in range(0, os.fstat(handle).st_size, _CHUNK):
            if not _is_cached(handle, at):
                os.preadv(handle, [buffer], at)


def _is_cached(handle: int, at: int) -> bool:
    """Return whether the kernel has what is at `at`; false where it does not tell."""
    try:
        return os.preadv(handle, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except (OSError, AttributeError):  # BlockingIOError is how it says no
        return False
