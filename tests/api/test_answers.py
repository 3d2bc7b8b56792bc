"""The API server's JSON, whatever the objects in it hold: nothing costs more than the object it is in."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from api.manifests import nested
from finetune_api import answers

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)
TOO_DEEP = [200, 230, 1_200, 9_000, 100_000]


def listed(items: list[Any], **head: Any) -> bytes:
    return json.dumps({"kind": "FineTuneJobList", "metadata": {"resourceVersion": "7"}, "items": items} | head).encode()


def deep(levels: int, name: str = "deep") -> str:
    return f'{{"metadata":{{"name":"{name}"}},"spec":{"[" * levels}{{"a":1}}{"]" * levels},"status":{{"phase":"x"}}}}'


def depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth, children), default=0) if isinstance(value, dict | list) else 0


@pytest.mark.parametrize("levels", TOO_DEEP)
def test_what_is_too_deep_is_cut_off_and_the_rest_is_read(levels: int):
    found, is_whole = answers.read_object(deep(levels).encode())
    assert not is_whole
    assert (found["metadata"], found["status"]) == ({"name": "deep"}, {"phase": "x"})
    assert depth(found) == answers.MAX_DEPTH
    assert answers.TOO_DEEP in json.dumps(found["spec"])


@pytest.mark.parametrize("levels", TOO_DEEP)
def test_one_object_that_is_too_deep_costs_no_other(levels: int):
    whole = {"metadata": {"name": "b"}, "items": [{"items": {}}], "spec": {"text": '"]}{[\\'}}
    found = answers.read_list(listed([whole, "here", whole]).replace(b'"here"', deep(levels).encode()))
    assert found.head == {"kind": "FineTuneJobList", "metadata": {"resourceVersion": "7"}}
    assert found.items[0] == found.items[2] == whole
    assert found.items[1]["metadata"]["name"] == "deep"
    assert (found.cut, found.lost) == ({1}, 0)


def test_what_is_no_object_is_counted_and_costs_no_other():
    found = answers.read_list(b'{"metadata":{},"items":[{"a":"\\ud800"},{"b":1},{"c":NO}]}')
    assert (found.items, found.cut, found.lost) == ([{"b": 1}], frozenset(), 2)
    found = answers.read_list(listed([{"b": 1}, None, "x", 3]))
    assert (found.items, found.cut, found.lost) == ([{"b": 1}], frozenset(), 3)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"<!DOCTYPE html><html>", b"null", b"7", b"[]", b"{}", b'{"items":[]}', b'{"metadata":{}}', b'"items"'),
        *(b'{"metadata":{},"items":{}}', b'{"metadata":[],"items":[]}', b'{"metadata":{},"items":[{"a":1}', b"\xff"),
        *(b'{"metadata":{},"items":[{"a":"' + b'\\"' * 10_000, b"[" * 10_000, b'{"items":' * 10_000),
    ],
)
def test_an_answer_that_is_no_list_is_never_taken_for_an_empty_one(data: bytes):
    with pytest.raises(ValueError):
        answers.read_list(data)


@given(st.lists(OBJECTS, max_size=4))
def test_what_can_be_read_is_read_as_it_is(items: list[Any]):
    data = listed(items)
    assert answers.read_list(data).items == from_json(data)["items"]
    for item in items:
        assert answers.read_object(json.dumps(item).encode()) == (from_json(json.dumps(item)), True)


@given(st.lists(OBJECTS, max_size=4), st.integers(0, 4), st.integers(200, 300))
def test_objects_read_apart_are_the_same_as_those_read_together(items: list[Any], place: int, levels: int):
    data = listed([*items[:place], "here", *items[place:]]).replace(b'"here"', deep(levels).encode(), 1)
    found = answers.read_list(data)
    at = min(place, len(items))
    assert found.cut == {at}
    assert [item for index, item in enumerate(found.items) if index != at] == from_json(listed(items))["items"]


def check_damaged(noise: random.Random) -> None:
    """Bytes changed, dropped, doubled, cut off: read or refused, never anything else."""
    data = bytearray(listed([nested(noise.randint(1, 300)), {"a": '"{'}, {"items": [{}]}]))
    for _ in range(noise.randint(1, 6)):
        place = noise.randrange(len(data))
        kind = noise.randrange(4)
        if kind == 0:
            data[place] = noise.choice(b'"\\{}[],:0a\xff\x00')
        elif kind == 1:
            data[place : place + noise.randint(1, 20)] = b"}"
        elif kind == 2:
            data[place:place] = data[place : place + noise.randint(1, 200)]
        else:
            data = data[: max(1, place)]
    for read in (answers.read_object, answers.read_list):
        try:
            found = read(bytes(data))
        except ValueError:
            continue
        json.dumps(found[0] if isinstance(found, tuple) else [found.head, found.items])


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_are_read_or_refused(seed: int):
    noise = random.Random(seed)
    for _ in range(500):
        check_damaged(noise)


@pytest.mark.nightly
def test_many_more_damaged_bytes_are_read_or_refused():
    noise = random.Random()
    for _ in range(200_000):
        check_damaged(noise)


@pytest.mark.nightly
@settings(max_examples=20_000, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data: bytes):
    for read in (answers.read_object, answers.read_list):
        try:
            read(data)
        except ValueError:
            continue
