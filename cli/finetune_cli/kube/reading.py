"""Read the raw answers of the Kubernetes client, in bounded memory whatever the server sends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from finetune_api import answers
from finetune_cli.text_lines import LONGEST, text_lines

#: Of an answer; the API server keeps no object of more than 3 MiB.
MAX_OBJECT = 16 << 20
MAX_LIST = 512 << 20
_CHUNK = 1 << 16


def bound_errors(api: Any) -> None:
    """Have the client read no more of an error than an object may have: it reads those by itself, and whole."""
    ask = api.rest_client.request

    def request(*args: Any, **options: Any) -> Any:
        answer = ask(*args, **options)
        if not 200 <= answer.status < 300:
            answer.data = body(answer.response)
        return answer

    api.rest_client.request = request


def body(answer: Any, limit: int | None = None) -> bytes:
    """Return the bytes of an answer; raises ValueError when it has more than `limit`, or than an object has."""
    limit = MAX_OBJECT if limit is None else limit
    data = bytearray()
    with closing(answer):
        for chunk in answer.stream(_CHUNK):
            data += chunk
            if len(data) > limit:
                raise ValueError(f"it has more than {limit >> 20} MiB")
    return bytes(data)


def lines(answer: Any, longest: int = LONGEST) -> Iterator[str]:
    """Yield the lines of an answer as they come."""
    with closing(answer):
        yield from text_lines(answer.stream(_CHUNK), longest)


def events(answer: Any) -> Iterator[dict[str, Any]]:
    """Yield the events of a watch.

    Raises:
        ApiException: The server ends the watch with an error.
        ValueError: A line is no event.
    """
    from kubernetes.client.exceptions import ApiException

    for line in lines(answer, MAX_OBJECT):
        if not line.strip():
            continue
        event = answers.read_object(line.encode())[0]
        kind, found = event.get("type"), event.get("object")
        if not isinstance(kind, str) or not isinstance(found, dict):
            raise ValueError("a line of a watch is no event")
        if kind == "ERROR":
            code = found.get("code")
            raise ApiException(status=code if isinstance(code, int) else 500, body=str(found.get("message") or ""))
        yield event
