"""Data files that are compressed, read as a stream."""

import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO, Final, cast

from finetune_trainer.errors import DatasetInvalid

#: Endings of compressed files that are read.
SUFFIXES: Final = (".gz", ".xz", ".zst")
#: Endings of those that are not.
UNREAD: Final = (".br", ".bz2", ".lz4", ".lzma", ".sz", ".z", ".zip", ".7z")
#: What reading a damaged file raises.
DAMAGED: Final = (EOFError, OSError, lzma.LZMAError, zlib.error)


def split_suffix(path: str) -> tuple[str, str]:
    """Return the ending that tells the type of a file, and that of its compression or '': ('.jsonl', '.gz')."""
    last = Path(path).suffix.lower()
    return (Path(Path(path).stem).suffix.lower(), last) if last in SUFFIXES else (last, "")


def decompressed(file: BinaryIO, suffix: str, name: str) -> BinaryIO:
    """Return a file of what is compressed in `file`; messages call it `name`."""
    if suffix == ".gz":
        stream: object = gzip.GzipFile(fileobj=file)
    elif suffix == ".xz":
        stream = lzma.LZMAFile(file)  # noqa: SIM115 -- the caller closes what it reads from
    else:
        stream = _zstd(file, name)
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream)))


def _zstd(file: BinaryIO, name: str) -> object:
    try:
        import pyarrow
    except ImportError:
        raise DatasetInvalid(f"{name}: is compressed with zstd, and pyarrow, which reads that, is not here") from None
    return pyarrow.CompressedInputStream(file, "zstd")
