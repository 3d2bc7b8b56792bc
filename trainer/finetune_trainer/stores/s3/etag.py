"""What a server that computes no checksums tells all the same: its ETag, mostly an MD5 of the bytes it has got.

Never taken for security, and never believed when it differs (an encrypting server's is another number): then the object
is read back. https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
"""

import hashlib
import re
from pathlib import Path
from typing import Final

from finetune_trainer.stores.digest import CHUNK_BYTES

_ETAG: Final = re.compile(r'"?([0-9a-f]{32})(?:-(\d+))?"?')


def vouches_for(etag: str, local: Path, part_bytes: int) -> bool:
    """Whether `etag` is the MD5 of the file's bytes, or, sent in parts of `part_bytes`, that of its parts' MD5s."""
    found = _ETAG.fullmatch(etag)
    if found is None:
        return False
    if found[2] is None:
        return _md5(local, 0, local.stat().st_size).hex() == found[1]
    starts = range(0, local.stat().st_size, part_bytes)
    if len(starts) != int(found[2]):
        return False
    parts = b"".join(_md5(local, start, part_bytes) for start in starts)
    return hashlib.md5(parts, usedforsecurity=False).hexdigest() == found[1]


def _md5(local: Path, start: int, most: int) -> bytes:
    result = hashlib.md5(usedforsecurity=False)
    with local.open("rb") as file:
        file.seek(start)
        while most > 0 and (chunk := file.read(min(CHUNK_BYTES, most))):
            result.update(chunk)
            most -= len(chunk)
    return result.digest()
