"""Text of others: what a terminal would obey, or what hides or reorders text, is taken out; all else stays."""

import random
import time
import unicodedata

import pytest

from finetune_api.plain_text import is_plain_line, one_line, plain, plain_values


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("as it is: ✓ 漢字 𝒳 é ", "as it is: ✓ 漢字 𝒳 é "),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[1;1Hcleared", "cleared"),
        ("\x9b31mred in C1", "red in C1"),
        ("\x1b]0;title\x07shown", "shown"),
        ("\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;ZXZpbA==\x07clipboard", "clipboard"),
        ("\x1bP1$r0m\x1b\\device control", "device control"),
        ("\x1b]0;no end, so it stays readable", "]0;no end, so it stays readable"),
        ("\x1b\x1b[31m[2Jnested", "[2Jnested"),
        ("\x1b[\x1b[31m31mnested", "[31mnested"),
        ("\x1bcreset", "creset"),
        ("10 %\r100 %", "10 %\n100 %"),
        ("Windows\r\nlines", "Windows\nlines"),
        ("bell\x07 backspace\x08 null\x00 delete\x7f", "bell backspace null delete"),
        ("user\u202egpj.exe", "usergpj.exe"),
        ("is\u2066o\u2069late\u200b\ufeff", "isolate"),
        ("line\u2028separator\x85", "line\nseparator\n"),
        ("tag\U000e0041", "tag"),
        ("half\ud800", "half"),
        ("family 👨\u200d👩\u200d👧, می\u200cخواهم", "family 👨\u200d👩\u200d👧, می\u200cخواهم"),
    ],
)
def test_what_is_left_of_a_text(text: str, shown: str) -> None:
    assert plain(text) == shown
    assert plain(shown) == shown


def test_whatever_comes_no_control_is_left() -> None:
    noise = random.Random(0)
    alphabet = ["\x1b", "[", "]", "31", "m", ";", "\x07", "\\", "\x9b", "\x9d", "\x9c", "P", "\r", "\n", "a", "\u202e"]
    for _ in range(20_000):
        text = plain("".join(noise.choices(alphabet, k=noise.randint(0, 12))))
        assert all(unicodedata.category(character) not in ("Cc", "Cf", "Cs") for character in text.replace("\n", ""))
        assert plain(text) == text


@pytest.mark.parametrize("part", ["\x1b]", "\x1b[", "\x1b[1", "\x9b;", "\x1b", "\r", "\x1b]a\x1b[1", "\x90"])
def test_long_texts_take_time_in_proportion(part: str) -> None:
    def seconds(count: int) -> float:
        start = time.process_time()
        plain(part * count)
        return time.process_time() - start

    seconds(1000)
    assert seconds(400_000) < 200 * max(seconds(20_000), 1e-3)


def test_one_line_and_values() -> None:
    assert one_line(" two\r\nlines\t\x1b[1mhere ") == "two lines here"
    assert [is_plain_line(text) for text in ("a b", "a\nb", "a\tb", "\x9b1A", "")] == [True, False, False, False, True]
    assert plain_values({"a\x1b": ["\x07b", 1, None, {"c": True}]}) == {"a": ["b", 1, None, {"c": True}]}
