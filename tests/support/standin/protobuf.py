"""The body that kubectl 1.32 and newer sends for `kubectl create secret`: protobuf, read as far as it is a Secret.

Field numbers are those of generated.proto in k8s.io/api/core/v1 and k8s.io/apimachinery.
"""

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\x00"
_VARINT, _BYTES = 0, 2
_METADATA = {1: "name", 2: "generateName", 3: "namespace"}
_METADATA_MAPS = {11: "labels", 12: "annotations"}


def secret(body: bytes) -> dict[str, Any] | None:
    """The Secret as JSON would have it; None when the body is something else."""
    if not body.startswith(MAGIC):
        return None
    envelope = dict(_fields(body[len(MAGIC) :]))
    kind = {number: _text(value) for number, value in _fields(envelope[1])}
    if kind != {1: "v1", 2: "Secret"}:
        return None
    read: dict[str, Any] = {"apiVersion": "v1", "kind": "Secret", "metadata": {}, "data": {}, "stringData": {}}
    for number, value in _fields(envelope[2]):
        if number == 1:
            read["metadata"] = _metadata(value)
        elif number == 2:
            key, content = _entry(value)
            read["data"][key] = base64.b64encode(content).decode()
        elif number == 3:
            read["type"] = _text(value) or "Opaque"
        elif number == 4:
            key, content = _entry(value)
            read["stringData"][key] = content.decode()
    return read


def _metadata(message: bytes) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for number, value in _fields(message):
        if number in _METADATA and value:
            read[_METADATA[number]] = _text(value)
        elif number in _METADATA_MAPS:
            key, content = _entry(value)
            read.setdefault(_METADATA_MAPS[number], {})[key] = content.decode()
    return read


def _entry(message: bytes) -> tuple[str, bytes]:
    parts = dict(_fields(message))
    return _text(parts[1]), parts.get(2, b"")


def _text(value: bytes) -> str:
    return value.decode()


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of each field of bytes; numbers and flags are passed over, for nothing here needs them."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, place = _varint(message, place)
        elif wire == _BYTES:
            length, place = _varint(message, place)
            yield number, message[place : place + length]
            place += length
        else:
            raise ValueError(f"field {number} has wire type {wire}")


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
