"""Download one object in parallel ranges, each written straight to its place in the file.

s3transfer passes every chunk through a queue to one writing thread, which costs about three times the CPU time.
"""

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final

from botocore.exceptions import IncompleteReadError

from finetune_trainer.stores.base import OnProgress
from finetune_trainer.stores.digest import Digest, digest_chunks
from finetune_trainer.stores.s3.retry import RangeTries

#: Bytes read and written at once, per thread.
CHUNK_BYTES: Final = 512 * 1024
#: Bytes after which what has arrived is flushed to the disk.
_SYNC_BYTES: Final = 64 * 1024 * 1024

#: get_object of one object; `Range` is still open.
Get = Callable[..., dict[str, Any]]


def download(
    get: Get,
    size: int,
    local: Path,
    *,
    part_bytes: int,
    threads: int,
    tries: RangeTries,
    on_progress: OnProgress | None = None,
) -> Digest:
    """Write an object to `local` and return the digest of what arrived. Digest and disk keep up with the network.

    Args:
        get: Requests a range of the object.
        size: The object's size in bytes.
        local: The file to write; it is incomplete after an error.
        part_bytes: Bytes of one range.
        threads: Ranges in flight at a time.
        tries: Counts the tries of each range.
        on_progress: Told of bytes as they arrive.

    Raises:
        BotoCoreError, ClientError: A range cannot be fetched.
    """
    handle = os.open(local, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    pool = ThreadPoolExecutor(threads)
    try:
        _require_space(handle, size)
        os.truncate(handle, size)
        spans = [(start, min(start + part_bytes, size)) for start in range(0, size, part_bytes)]
        parts = [
            pool.submit(
                tries.policy(start), partial(_part, _ranged(get, start, end, size), handle, start, end, on_progress)
            )
            for start, end in spans
        ]
        return digest_chunks(_arrived(handle, spans, parts))
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(handle)


def _require_space(handle: int, size: int) -> None:
    """Believe no size that the disk cannot hold: each range of it would cost memory before the first byte arrives."""
    disk = os.fstatvfs(handle)
    if size > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _ranged(get: Get, start: int, end: int, size: int) -> Get:
    """Return `get` for one range. Of a whole object, botocore itself checks the server's checksum."""
    return get if end - start == size else partial(get, Range=f"bytes={start}-{end - 1}")


def _arrived(handle: int, spans: list[tuple[int, int]], parts: list[Future[None]]) -> Iterator[bytes]:
    """Yield the file's bytes in order as ranges arrive; they are read from the page cache, not from the disk."""
    unsynced = 0
    for (start, end), part in zip(spans, parts, strict=True):
        part.result()
        for at in range(start, end, CHUNK_BYTES):
            yield os.pread(handle, min(CHUNK_BYTES, end - at), at)
        unsynced += end - start
        if unsynced >= _SYNC_BYTES:  # else the disk would idle until the last byte has arrived
            os.fdatasync(handle)
            unsynced = 0


def _part(get: Get, handle: int, start: int, end: int, on_progress: OnProgress | None) -> None:
    """Fetch bytes start … end-1; a failed try takes back the progress that it reported."""
    at = start
    try:
        with closing(get()["Body"]) as body:
            for chunk in body.iter_chunks(CHUNK_BYTES):
                if at + len(chunk) > end:
                    break
                os.pwrite(handle, chunk, at)
                at += len(chunk)
                if on_progress is not None:
                    on_progress(len(chunk))
        if at != end:
            raise IncompleteReadError(actual_bytes=at - start, expected_bytes=end - start)
    except Exception:
        if on_progress is not None:
            on_progress(start - at)
        raise
