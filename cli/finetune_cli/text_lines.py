"""Lines of a text that arrives in chunks, in bounded memory whatever arrives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

#: A longer line is told in parts.
LONGEST = 1 << 20


def text_lines(chunks: Iterable[bytes], longest: int = LONGEST) -> Iterator[str]:
    """Yield the lines without their ends; what is not UTF-8 is replaced."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
        while len(rest) > longest:
            yield rest[:longest].decode(errors="replace")
            rest = rest[longest:]
    if rest:
        yield rest.decode(errors="replace")
