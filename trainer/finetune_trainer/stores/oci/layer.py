"""A file as one layer of an image: a tar of that file alone, the same bytes wherever and whenever it is made."""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from finetune_trainer.stores.digest import CHUNK_BYTES

MEDIA_TYPE: Final = "application/vnd.oci.image.layer.v1.tar"
#: The standard's name for a file's name.
_TITLE: Final = "org.opencontainers.image.title"
#: Where in the layer the file's bytes begin, and how many there are.
_OFFSET, _SIZE = "dev.finetune.offset", "dev.finetune.size"
_BLOCK: Final = 512
#: It becomes a part of URLs.
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        path: The file's path in the image.
        digest: sha256:<hex> of the tar.
        size: Bytes of the tar.
        offset: Where in it the file's bytes begin.
        length: Bytes of the file.
    """

    path: str
    digest: str
    size: int
    offset: int
    length: int

    @classmethod
    def of(cls, path: str, content: Path | bytes) -> Self:
        """Describe the layer of a file; reads all of it."""
        length = len(content) if isinstance(content, bytes) else content.stat().st_size
        header, digest, size = _header(path, length), hashlib.sha256(), 0
        for chunk in tar(path, content):
            digest.update(chunk)
            size += len(chunk)
        return cls(path, f"sha256:{digest.hexdigest()}", size, len(header), length)

    @classmethod
    def read(cls, descriptor: Any) -> Self:
        """Return the layer of a descriptor in an image's manifest; raises ValueError if it is none of ours."""
        try:
            annotations = descriptor["annotations"]
            found = cls(
                str(annotations[_TITLE]),
                str(descriptor["digest"]),
                int(descriptor["size"]),
                int(annotations[_OFFSET]),
                int(annotations[_SIZE]),
            )
        except (KeyError, TypeError, OverflowError):  # OverflowError: JSON's 1e999
            raise ValueError("a layer that is no file of ours") from None
        if not _DIGEST.fullmatch(found.digest):
            raise ValueError(f"a layer whose digest is no SHA-256: {found.path!r}")
        if not 0 <= found.offset <= found.offset + found.length <= found.size:
            raise ValueError(f"a layer whose file does not lie in it: {found.path!r}")
        return found

    def descriptor(self) -> dict[str, Any]:
        """Return its entry in an image's manifest."""
        annotations = {_TITLE: self.path, _OFFSET: str(self.offset), _SIZE: str(self.length)}
        return {"mediaType": MEDIA_TYPE, "digest": self.digest, "size": self.size, "annotations": annotations}


def tar(path: str, content: Path | bytes) -> Iterator[bytes]:
    """Yield the bytes of the layer of one file."""
    length = len(content) if isinstance(content, bytes) else content.stat().st_size
    yield _header(path, length)
    if isinstance(content, bytes):
        yield content
    else:
        with content.open("rb") as file:
            yield from iter(lambda: file.read(CHUNK_BYTES), b"")
    yield bytes(-length % _BLOCK + 2 * _BLOCK)


def _header(path: str, length: int) -> bytes:
    member = tarfile.TarInfo(path)
    member.size, member.mode = length, 0o644
    return member.tobuf(format=tarfile.PAX_FORMAT)
