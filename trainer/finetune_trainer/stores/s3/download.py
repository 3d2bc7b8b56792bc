"""Download one object in parallel ranges, each written straight to its place in the file.

s3transfer passes every chunk through a queue to one writing thread, which takes about three times the CPU time.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final

from botocore.exceptions import IncompleteReadError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from finetune_trainer.stores.base import OnProgress
from finetune_trainer.stores.digest import Digest, digest_chunks
from finetune_trainer.stores.s3.retry import is_garbled

#: Bytes read and written at once, per thread.
CHUNK_BYTES: Final = 512 * 1024
#: Bytes after which what has come is pushed to the disk.
_SYNC_BYTES: Final = 64 * 1024 * 1024
#: Tries of one range whose answer breaks off; each request is also tried several times by botocore.
ATTEMPTS: Final = 3

#: get_object of one object, still wanting Range.
Get = Callable[..., dict[str, Any]]


def download(
    get: Get, size: int, local: Path, part_bytes: int, threads: int, on_progress: OnProgress | None = None
) -> Digest:
    """Write the object's `size` bytes to `local`; their digest, and most of the way to the disk, go along meanwhile.

    Raises botocore's errors; `local` is then incomplete.
    """
    handle = os.open(local, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    pool = ThreadPoolExecutor(threads)
    try:
        os.truncate(handle, size)
        spans = [(start, min(start + part_bytes, size)) for start in range(0, size, part_bytes)]
        parts = [pool.submit(_with_retries, partial(_part, get, handle, *span, on_progress)) for span in spans]
        return digest_chunks(_landed(handle, spans, parts))
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(handle)


def _landed(handle: int, spans: list[tuple[int, int]], parts: list[Future[None]]) -> Iterator[bytes]:
    """The file's bytes in order, as far as they are here. They are read back from memory, not from the disk."""
    unsynced = 0
    for (start, end), part in zip(spans, parts, strict=True):
        part.result()
        for at in range(start, end, CHUNK_BYTES):
            yield os.pread(handle, min(CHUNK_BYTES, end - at), at)
        unsynced += end - start
        if unsynced >= _SYNC_BYTES:  # else the disk would idle until the last byte is here
            os.fdatasync(handle)
            unsynced = 0


def _with_retries(run: Callable[[], None]) -> None:
    Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.1, max=1),
        retry=retry_if_exception(is_garbled),
        reraise=True,
    )(run)


def _part(get: Get, handle: int, start: int, end: int, on_progress: OnProgress | None) -> None:
    """Bytes start … end-1; what a failed try has reported is taken back."""
    at = start
    try:
        with closing(get(Range=f"bytes={start}-{end - 1}")["Body"]) as body:
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
