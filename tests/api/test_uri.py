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


@given(st.text(max_size=60) | st.from_regex(r"(s3|pvc|file|hf)://[a-z./@% é数]{0,30}", fullmatch=True))
def test_nothing_that_parses_can_climb_out_or_hide_something(text: str):
    try:
        parsed = uri.parse(text)
    except ValueError as error:
        assert str(error)
        return
    assert ".." not in parsed.path.split("/")
    assert not re.search(r"[?#$`;&|<>\\]|[^\S ]|(^|/) | (/|$)", str(parsed))
    assert str(parsed).replace("\u200c", "").replace("\u200d", "").isprintable()
    assert "@" not in parsed.authority
    assert str(parsed) == (text if parsed.path else text.rstrip("/"))


def test_a_rule_means_the_same_in_cel_and_in_python():
    rule = uri.rules(uri.WRITABLE)[-1]
    assert rule.cel.isascii()
    literal = re.sub(r"\\U([0-9a-f]{8})", lambda code: chr(int(code[1], 16)), rule.cel)
    assert literal == f"self.matches('{rule.pattern}')"
    assert "'" not in rule.pattern
    assert "\\" not in rule.pattern


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:pw@bucket/x", "…@bucket/x"),
        ("s3://AKIA:se/cret@bucket/x", "…@bucket/x"),
        ("S3://AKIA:se/c@ret@bucket/x", "…@bucket/x"),
        ("s3+https://AKIA:pw@host/x", "…@host/x"),
        ("s3:/AKIA:se/cret@bucket/x", "…@bucket/x"),
        ("AKIA:se/cret@bucket/x", "…@bucket/x"),
        (" 's3://AKIA:pw@bucket/x", "…@bucket/x"),
        ("s3://AKIA:se\ncret@bucket/x", "…@bucket/x"),
        ("https://host/x?X-Amz-Signature=0123", "https://host/x?…"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("file:///models@1/a:b@c", "file:///models@1/a:b@c"),
        ("hf://owner/name", "hf://owner/name"),
        ("plain text", "plain text"),
    ],
)
def test_what_may_be_a_secret_is_not_shown(text: str, shown: str):
    assert uri.redacted(text) == shown


@given(st.sampled_from(uri.READABLE), st.text("abc123/+:@", min_size=1, max_size=12), st.text("abc/:@", max_size=12))
def test_no_part_of_a_password_is_shown(scheme: str, secret: str, rest: str):
    text = f"{scheme}://AKIA:SE{secret}CRET@bucket/{rest}"
    assert "SE" not in uri.redacted(text)
    with pytest.raises(ValueError, match="must not hold credentials"):
        uri.parse(text)
