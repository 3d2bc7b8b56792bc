"""Remove credentials from text before anyone sees it."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from typing import Final
from urllib.parse import quote, quote_plus

HIDDEN: Final = "…"
#: Shorter values would take words out of sentences.
_LEAST: Final = 5
_USERINFO: Final = re.compile(r"(?<=://)[^/\s@\"']*@")
#: What follows is a word of a sentence, unless it is long and holds more than letters.
_HEADER: Final = re.compile(r"\b(Bearer|Basic)\s+(?=[^\s'\",]*[\d_=+/.\\])[^\s'\",]{8,}", re.IGNORECASE)
_SIGNED: Final = re.compile(r"\b(AWS4-HMAC-SHA256)\s+Credential=[^'\"\r\n]*")
_QUERY: Final = re.compile(r"\b(X-Amz-(?:Signature|Credential|Security-Token)|Signature|sig)=[^&\s'\"]+", re.IGNORECASE)

_lock = threading.Lock()
_forms: set[str] = set()


def remember(value: str) -> None:
    """Hide the secret `value` from now on, in every form that a library may quote it in."""
    forms = {form for part in {value, *value.splitlines()} if len(part.strip()) >= _LEAST for form in _as_quoted(part)}
    with _lock:
        _forms.update(forms)


def redacted(text: str) -> str:
    """Return `text` without secrets: those to remember, authorization headers, signed queries, users of URLs."""
    with _lock:
        known = sorted(_forms, key=len, reverse=True)
    for form in known:
        text = text.replace(form, HIDDEN)
    text = _SIGNED.sub(rf"\1 {HIDDEN}", _HEADER.sub(rf"\1 {HIDDEN}", text))
    text = _QUERY.sub(rf"\1={HIDDEN}", text)
    return _USERINFO.sub("", text)


def _as_quoted(value: str) -> Iterator[str]:
    """Yield `value` as it is, as a literal of Python or JSON, in a URL, and in base64 at each offset."""
    plain = value.strip()
    data = plain.encode()
    for form in (plain, repr(plain)[1:-1], repr(data)[2:-1], quote(plain, safe=""), quote(plain), quote_plus(plain)):
        yield form
        yield json.dumps(form)[1:-1]
        yield json.dumps(form, ensure_ascii=False)[1:-1]
    for offset in range(3):  # what is before it, as a user in "user:password", shifts it
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            whole = encode(b"\0" * offset + data).decode().rstrip("=")
            # The first and last characters also depend on what is before and after.
            inner = whole[(0, 2, 3)[offset] : len(whole) - (1 if (offset + len(data)) % 3 else 0)]
            if len(inner) >= _LEAST:
                yield inner
