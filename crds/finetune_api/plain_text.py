"""Text that others wrote (pods, trainers, stores, models), made safe to show.

A terminal obeys escape sequences: they recolor and overwrite what stands above, set titles, write to the clipboard.
Characters that reorder or hide others make a line read as another one (https://trojansource.codes).
"""

import re
from typing import Any, Final

#: What a terminal obeys: a control sequence (colors, cursor), or a string to it (title, link, clipboard) with its end.
_SEQUENCE: Final = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9b-\x9f]*(?:\x07|\x1b\\|\x9c)"
)
_LINE_END: Final = re.compile("\r\n?|[\u2028\u2029\x85]")
#: C0 but tab and newline, DEL, C1, lone surrogates, and format characters. Joiners stay: some scripts need them.
_UNSAFE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)


def plain(text: str) -> str:
    """Return `text` without terminal escapes and invisible characters; of all controls, tab and newline stay."""
    if text.isprintable():
        return text
    return _UNSAFE.sub("", _LINE_END.sub("\n", _SEQUENCE.sub("", text)))


def one_line(text: str) -> str:
    """Return `text` as `plain` does, on one line."""
    return " ".join(plain(text).split())


def is_plain_line(text: str) -> bool:
    """Return whether `text` is one line in which everything shows as it is."""
    return plain(text) == text and "\n" not in text and "\t" not in text


def plain_values(data: Any) -> Any:
    """Return JSON-like `data` with every text in it made plain."""
    if isinstance(data, str):
        return plain(data)
    if isinstance(data, dict):
        return {plain_values(key): plain_values(value) for key, value in data.items()}
    return [plain_values(value) for value in data] if isinstance(data, list) else data
