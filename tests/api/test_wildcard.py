"""The pattern language of the administrator's rules."""

import pytest

from finetune_api.wildcard import matches


@pytest.mark.parametrize(
    ("text", "pattern"), [("team-a", "team-*"), ("team-", "team-*"), ("a.b", "*.*"), ("", "*"), ("a[1]?", "a[1]?")]
)
def test_a_star_stands_for_any_text_and_the_rest_for_itself(text: str, pattern: str):
    assert matches(text, pattern)


@pytest.mark.parametrize(
    ("text", "pattern"), [("a", "?"), ("a", "[ab]"), ("a", "[!b]"), ("axb", "a.b"), ("a", "A"), ("a\n", "a"), ("a", "")]
)
def test_nothing_else_is_special(text: str, pattern: str):
    assert not matches(text, pattern)


def test_many_stars_take_no_longer():
    assert not matches("a" * 5000, "*a" * 20 + "*" * 5000 + "b")
