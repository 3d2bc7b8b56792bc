"""What is wrong with text that is not YAML, in words that name the mistake. PyYAML tells what its scanner met."""

import re
from typing import Final

import yaml

#: PyYAML's words, what they mean, and whether the mistake is where the construct begins rather than where it broke.
_MEANINGS: Final = (
    (r"found unexpected end of stream", "a quote opens here and is never closed", True),
    (r"found character '\\t'", "a tab stands here, and YAML indents with spaces", False),
    (r"found character '(.)' that cannot", r"a value that begins with \1 must stand in quotes", False),
    (r"expected alphabetic or numeric", "a value that begins with * or & must stand in quotes", False),
    (
        r"mapping values are not allowed",
        "a colon where none can be: the line is indented too far, or a value that holds ': ' needs quotes",
        False,
    ),
    (r"expected <block end>, but found '(?:-|\?)'", "list items (- …) and keys are mixed", False),
    (r"expected <block end>", "the line is indented as no line above it", False),
    (r"could not find expected ':'", "a key without a value: write key: value", True),
    (
        r"expected ',' or '(.)', but got '<stream end>'",
        r"the bracket of line {begin} lacks its \1 at the end of the file",
        False,
    ),
    (r"expected ',' or '(.)'", r"a comma or \1 is missing: the bracket opens in line {begin}", False),
    (r"sequence entries are not allowed", "a list begins on a line of its own, or is written [a, b]", False),
    (r"expected '<document start>'", "a new document begins here without ---; is this an unrendered template?", False),
    (r"found unknown escape character", r"in double quotes, \\ begins an escape: use single quotes", False),
)


def explain(error: yaml.YAMLError) -> tuple[str, int | None]:
    """Return what is wrong and its line, counted from 1 (None where PyYAML does not know)."""
    mark, begin = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    said = getattr(error, "problem", None) or str(error).splitlines()[0]
    for pattern, meaning, at_begin in _MEANINGS:
        if found := re.match(pattern, said):
            said = found.expand(meaning).replace("{begin}", str(begin.line + 1 if begin else "?"))
            mark = begin if at_begin and begin else mark
            break
    return (f"{said} (column {mark.column + 1})", mark.line + 1) if mark else (said, None)
