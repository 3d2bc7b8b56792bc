"""Check where a hub leads, and the names that it gives before its client makes paths of them.

huggingface_hub 2.4 uses a server's ETag and commit as parts of a path, as they come: `../` and absolute ones too. It
follows redirects to any server, and where the caller names no time, it waits for an answer for ever.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import httpx2
from huggingface_hub.utils._http import default_client_factory

from finetune_api import artifact_manifest
from finetune_trainer.stores import endpoints, patience

_COMMIT: Final = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}")
_API: Final = re.compile(r"/api/(models|datasets)/(?!.*/resolve/)")
_IS_API: Final = "finetune.is_api"
_HEADERS: Final = (("X-Repo-Commit", _COMMIT), ("X-Xet-Hash", _ID))
#: An ETag names a file only in an answer to HEAD; elsewhere it may hold a slash.
_HEAD_HEADERS: Final = (("ETag", _ID), ("X-Linked-Etag", _ID))
_SHOWN: Final = 80
#: Of one answer of the API: a thousand bytes for each of 64 thousand files.
MAX_BYTES: Final = 64 << 20
_CHUNK: Final = 1 << 16
#: Seconds to wait for a connection, for an answer to a question, and for one to what was written.
CONNECT_SECONDS, ANSWER_SECONDS, WRITTEN_SECONDS = 10, 15, 120


class UnsafeAnswer(ValueError):
    """A hub names a file, a commit or a content by something that is no safe file name."""


class ForbiddenDetour(UnsafeAnswer):
    """A hub leads to a server that the administrator lets no pod ask."""


def checked_client() -> httpx2.Client:
    """Return the hub library's own HTTP client, which raises UnsafeAnswer for an answer with an unsafe name."""
    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {"request": [*hooks["request"], _prepare], "response": [*hooks["response"], check]}
    return client


def _prepare(request: httpx2.Request) -> None:
    """Bound the wait, and note whether this is a question to the hub's API: a redirect keeps the note.

    Raises ForbiddenDetour if the hub leads to where the administrator lets no pod ask.
    """
    request.extensions.setdefault(_IS_API, _API.search(request.url.path) is not None)
    if refusal := endpoints.refusal(str(request.url)):
        raise ForbiddenDetour(refusal)
    answer = ANSWER_SECONDS if request.method in ("GET", "HEAD") else WRITTEN_SECONDS
    bounds = {"connect": CONNECT_SECONDS, "read": answer, "write": WRITTEN_SECONDS, "pool": None}
    asked = {name: given for name, given in request.extensions.get("timeout", {}).items() if given is not None}
    request.extensions["timeout"] = bounds | asked


def check(response: httpx2.Response) -> None:
    """Raise UnsafeAnswer if `response` holds a name that would lead out of the cache."""
    patience.answered()
    headers = (*_HEADERS, *(_HEAD_HEADERS if response.request.method == "HEAD" else ()))
    for header, allowed in headers:
        value = response.headers.get(header)
        if value is not None and not allowed.fullmatch(_unquoted(value)):
            raise _unsafe(header, value)
    if response.request.extensions.get(_IS_API):
        following = response.links.get("next", {}).get("url", "")
        if following and not _is_api(following):  # its answer would pass for a file
            raise UnsafeAnswer("its next page is not one of its API")
        _check_body(_read(response))


def _is_api(url: str) -> bool:
    try:
        return _API.search(httpx2.URL(url).path) is not None
    except httpx2.InvalidURL:
        return False


def _read(response: httpx2.Response) -> bytes:
    """Return the body, as `response.read` does and keeps it, unless it is longer than a list of files can be."""
    body = bytearray()
    for chunk in response.iter_bytes(_CHUNK):
        body += chunk
        if len(body) > MAX_BYTES:
            response.close()
            raise UnsafeAnswer(f"what its API says is longer than {MAX_BYTES >> 20} MiB")
    response._content = bytes(body)
    return response._content


def _unquoted(etag: str) -> str:
    """Return an ETag as the hub's client takes it."""
    return etag.lstrip("W/").strip('"')


def _check_body(body: bytes) -> None:
    try:
        answer = json.loads(body)
    except ValueError:  # an error page: the hub's client says so
        return
    except RecursionError:
        raise UnsafeAnswer("what its API says nests too deep") from None
    for what, value in _names(answer):
        is_safe = _is_file(value) if what == "file" else isinstance(value, str) and _is_id(what, value)
        if value is not None and not is_safe:
            raise _unsafe(what, value)


def _names(answer: Any) -> Iterator[tuple[str, Any]]:
    """Yield what the API names: of a repository its commit and files, of a tree each file and its content."""
    if isinstance(answer, dict):
        yield "commit", answer.get("sha")
        yield from (("file", file.get("rfilename")) for file in _dicts(answer.get("siblings")))
    for entry in _dicts(answer):
        yield "file", entry.get("path")
        yield "content", entry.get("oid")
        yield "content", entry.get("xetHash")
        yield from (("content", lfs.get(key)) for lfs in _dicts([entry.get("lfs")]) for key in ("oid", "sha256"))


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    return (item for item in value if isinstance(item, dict)) if isinstance(value, list) else iter(())


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and not artifact_manifest.fault_of_path(value)


def _is_id(what: str, value: str) -> bool:
    return (_COMMIT if what == "commit" else _ID).fullmatch(value) is not None


def _unsafe(what: str, value: object) -> UnsafeAnswer:
    shown = repr(value)
    return UnsafeAnswer(
        f"its {what} {shown if len(shown) <= _SHOWN else f'{shown[:_SHOWN]}…'} is not safe as the name of a file"
    )
