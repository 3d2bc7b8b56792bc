"""Read the API server's JSON, whatever the objects in it hold.

A stored object may nest deeper than any parser goes. What is too deep is cut off, so that the rest of the object, and
all other objects of the same answer, are read.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic_core import from_json

#: Levels of one object that are read when it nests too deep to be read whole. A valid object has fewer than 40.
MAX_DEPTH: Final = 64
#: A longer list is read item by item: parsed, it takes thirty times its bytes.
TOGETHER_BYTES: Final = 4 << 20
#: Stands for what was cut off. No field of the API takes a text where it takes an object or a list.
TOO_DEEP: Final = f"not read: nested more than {MAX_DEPTH} levels deep"
_CUT = b'"' + TOO_DEEP.encode() + b'"'
#: A text, closed or not, or a bracket. Possessive, so that no input takes more than one pass.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_NO_LIST = "no list of objects"
_QUOTE, _OPENING, _CLOSING = ord('"'), frozenset(b"[{"), frozenset(b"]}")


@dataclass(frozen=True)
class Listing:
    """A list as the API server answers it.

    Attributes:
        head: The answer without its items.
        items: The objects; what was too deep in them is cut off.
        cut: The indexes of the items from which something was cut off.
        lost: The number of items that are no JSON objects.
    """

    head: dict[str, Any]
    items: list[dict[str, Any]]
    cut: frozenset[int] = field(default_factory=frozenset)
    lost: int = 0


def read_object(data: bytes) -> tuple[dict[str, Any], bool]:
    """Return the JSON object, and whether it is whole. Raises ValueError where there is none, such as in HTML."""
    found, is_whole = _read(data)
    if not isinstance(found, dict):
        raise ValueError(f"JSON, but no object: {type(found).__name__}")
    return found, is_whole


def read_list(data: bytes, is_wanted: Callable[[dict[str, Any]], bool] = lambda item: True) -> Listing:
    """Return the list with the items that are wanted; those of a long answer are in memory one after another.

    Raises ValueError for an answer that is no list: it must never be taken for an empty one.
    """
    if len(data) > TOGETHER_BYTES:
        return _read_apart(data, is_wanted)
    try:
        head = from_json(data)
    except ValueError:
        return _read_apart(data, is_wanted)
    found = head.pop("items", 0) if isinstance(head, dict) else 0
    found = [] if found is None else found  # as Go may write an empty list
    if not isinstance(found, list) or not isinstance(head.get("metadata"), dict):
        raise ValueError(_NO_LIST)
    items = [item for item in found if isinstance(item, dict)]
    return Listing(head, [item for item in items if is_wanted(item)], lost=len(found) - len(items))


def _read(data: bytes) -> tuple[Any, bool]:
    try:
        return from_json(data), True
    except ValueError:
        shallow = _cut(data)
        if shallow == data:
            raise
    return from_json(shallow), False


def _read_apart(data: bytes, is_wanted: Callable[[dict[str, Any]], bool]) -> Listing:
    """Read one item after another: one that cannot be read costs no other."""
    spans, (begin, end) = _items(data)
    head, _ = _read(data[:begin] + data[end:])
    items: list[dict[str, Any]] = []
    cut, lost = set(), 0
    for first, last in spans:
        try:
            item, is_whole = read_object(data[first:last])
        except ValueError:
            lost += 1
            continue
        if not is_wanted(item):
            continue
        if not is_whole:
            cut.add(len(items))
        items.append(item)
    if not isinstance(head, dict) or not isinstance(head.get("metadata"), dict):
        raise ValueError(_NO_LIST)
    head.pop("items", None)
    return Listing(head, items, frozenset(cut), lost)


def _levels(data: bytes) -> Iterator[tuple[re.Match[bytes], int, int]]:
    """Yield every text and bracket with its first byte and its level; the brackets of one value have the same."""
    level = 0
    for token in _TOKEN.finditer(data):
        first = data[token.start()]
        level += first in _OPENING
        yield token, first, level
        level -= first in _CLOSING


def _cut(data: bytes) -> bytes:
    """Replace every object and list below MAX_DEPTH levels."""
    kept, begin = [], 0
    for token, first, level in _levels(data):
        if level == MAX_DEPTH + 1 and first != _QUOTE:
            if first in _OPENING:
                kept += [data[begin : token.start()], _CUT]
            begin = token.end() if first in _CLOSING else len(data)
    return b"".join([*kept, data[begin:]])


def _items(data: bytes) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Return where each object of the top level's `items` lies, and where all that is between its brackets does."""
    spans: list[tuple[int, int]] = []
    key, begin, start = b"", 0, 0
    for token, first, level in _levels(data):
        if first == _QUOTE:
            key = token[0] if level == 1 else key
        elif key == b'"items"' and level == 2:
            if first in _CLOSING:
                return spans, (begin, token.start())
            begin = token.end()
        elif key == b'"items"' and level == 3:
            if first in _OPENING:
                start = token.start()
            else:
                spans.append((start, token.end()))
    raise ValueError(_NO_LIST)
