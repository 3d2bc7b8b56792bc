"""Compute digests of files in one pass with bounded memory."""

import base64
import hashlib
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Digest:
    """The digest of a file.

    Attributes:
        size: Bytes.
        sha256: 64 hexadecimal digits.
        crc32: CRC-32 (ISO-HDLC), which S3 calls CRC32.
    """

    size: int
    sha256: str
    crc32: int

    @property
    def crc32_base64(self) -> str:
        """The CRC in the form of S3's x-amz-checksum-crc32: big-endian, base64."""
        return base64.b64encode(self.crc32.to_bytes(4, "big")).decode()


def digest_chunks(chunks: Iterable[bytes], sink: Callable[[bytes], object] | None = None) -> Digest:
    """Return the digest of all `chunks`; each is passed to `sink` on the way."""
    size, sha, crc = 0, hashlib.sha256(), 0
    for chunk in chunks:
        size += len(chunk)
        sha.update(chunk)
        crc = zlib.crc32(chunk, crc)
        if sink is not None:
            sink(chunk)
    return Digest(size, sha.hexdigest(), crc)


def digest_bytes(data: bytes) -> Digest:
    """Return the digest of `data`."""
    return digest_chunks([data])


def digest_file(path: Path) -> Digest:
    """Return the digest of the file at `path`; raises OSError."""
    with path.open("rb") as file:
        return digest_chunks(iter(lambda: file.read(CHUNK_BYTES), b""))
