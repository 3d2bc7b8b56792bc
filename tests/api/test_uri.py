"""URIs: what parses, what comes out again, what is refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api import uri


@pytest.mark.parametrize(
    ("text", "authority", "path"),
    [
        ("hf://mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-v0.3", ""),
        ("hf://datasets/nyu-mll/multi_nli/train.jsonl", "nyu-mll/multi_nli", "train.jsonl"),
        ("s3://bucket/a/b.jsonl", "bucket", "a/b.jsonl"),
        ("s3://bucket", "bucket", ""),
        ("pvc://claim/models/x/", "claim", "models/x/"),
        ("file:///data/train.jsonl", "", "/data/train.jsonl"),
    ],
)
def test_parts(text: str, authority: str, path: str):
    parsed = uri.parse(text)
    assert (parsed.authority, parsed.path, str(parsed)) == (authority, path, text)


def test_joining_keeps_one_slash():
    assert str(uri.parse("s3://bucket/a/").join("b", "c")) == "s3://bucket/a/b/c"
    assert str(uri.parse("s3://bucket").join("b")) == "s3://bucket/b"
    assert str(uri.parse("file:///a").join("b")) == "file:///a/b"


@given(st.text(max_size=60) | st.from_regex(r"(s3|pvc|file|hf)://[a-z./@%]{0,30}", fullmatch=True))
def test_nothing_that_parses_can_climb_out_or_hide_something(text: str):
    try:
        parsed = uri.parse(text)
    except ValueError as error:
        assert str(error)
        return
    assert ".." not in parsed.path.split("/")
    assert not re.search(r"[\s%?#$`;&|<>\\]", str(parsed))
    assert "@" not in parsed.authority
    assert str(parsed) == text


def test_a_rule_means_the_same_in_cel_and_in_python():
    rule = uri.rules(uri.WRITABLE)[-1]
    assert rule.cel == f"self.matches('{rule.pattern}')"
    assert "'" not in rule.pattern
    assert "\\" not in rule.pattern
