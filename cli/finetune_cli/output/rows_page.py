"""The page of `finetune inspect`: figures of each split, then rows with what is learned of them."""

from __future__ import annotations

import html as escaping
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_cli.output import console

_BAR = 40
_STYLES = {(True, False): "green", (True, True): "bold green", (False, False): "dim", (False, True): "dim yellow"}
_HTML = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: 1rem; border-radius: 6px }}
.learned {{ background: #c8efcf }}
.masked {{ color: #777 }}
.special {{ border-bottom: 2px solid #c90; font-weight: 600 }}
</style>
<h1>{title}</h1>
<p><span class="learned">learned</span> · <span class="masked">not learned</span> ·
<span class="special">special</span></p>
{body}
"""


def show(found: Mapping[str, Any]) -> None:
    """Print the page."""
    from rich.text import Text

    screen = console.out()
    for split in found["splits"]:
        screen.print(Text(f"{split['role']}: {split['rows']:,} rows of {split['format']}", style="bold"))
        for line in lines(split, found["max_length"]):
            screen.print(Text(f"  {line}"))
        for line in histogram(split["histogram"]):
            screen.print(Text(f"  {line}", style="cyan"))
        for problem in split["problems"]:
            screen.print(Text(f"  {console_text(problem)}", style="red"))
        screen.print()
    for note in found["notes"]:
        screen.print(Text(f"{note}\n", style="yellow"))
    for split in found["splits"]:
        for number, pieces in enumerate(split["examples"], 1):
            screen.print(Text(f"{split['role']} {number}", style="bold"))
            row = Text()
            for piece in pieces:
                text = console_text(piece["text"])
                row.append(f"[{text}]" if piece["special"] else text, _STYLES[piece["learned"], piece["special"]])
            screen.print(row, soft_wrap=True)
            screen.print()


def console_text(text: str) -> str:
    """Return a text of others without what a terminal would obey."""
    from finetune_api.plain_text import plain

    return plain(text)


def lines(split: Mapping[str, Any], max_length: int) -> Iterator[str]:
    """Yield the figures of one split, one line each."""
    rows, tokens = split["rows"], split["tokens"]
    yield f"{tokens:,} tokens, {_share(split['learned'], tokens)} of them learned"
    if split["percentiles"]:
        yield "length: " + ", ".join(f"{name} {value:,}" for name, value in split["percentiles"].items())
    cut = f"training.maxLength {max_length:,} cuts {split['cut']:,} rows ({_share(split['cut'], rows)})"
    better = f"; {split['suggestion']:,} would cut hardly any" if split["suggestion"] else ""
    yield cut + better
    for name, words in (
        ("unlearnable", "rows have nothing to learn once they are cut"),
        ("empty", "rows have nothing to learn"),
        ("missed_turns", "turns of the assistant are not learned: the chat template writes them anew"),
        ("duplicates", "rows are duplicates"),
        ("overlap", "held-out rows are training rows, too"),
        ("bad", "rows cannot be used"),
    ):
        if split[name]:
            yield f"{split[name]:,} {words}"


def histogram(bars: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    """Yield a line for each bar: lengths, a bar, rows."""
    most = max((rows for _, _, rows in bars), default=0)
    width = len(f"{bars[-1][1]:,}") if bars else 0
    for first, last, rows in bars:
        yield f"{first:>{width},}–{last:<{width},} {'█' * -(-rows * _BAR // most):<{_BAR}} {rows:,}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"


def html(found: Mapping[str, Any], title: str) -> str:
    """Return the page for a browser. It loads nothing."""
    parts = []
    for split in found["splits"]:
        figures = [*lines(split, found["max_length"]), *histogram(split["histogram"]), *split["problems"]]
        parts.append(f"<h2>{split['role']}: {split['rows']:,} rows of {_safe(split['format'])}</h2>")
        parts.append(f"<pre>{_safe(chr(10).join(figures))}</pre>")
        parts += [f"<pre>{''.join(map(_piece, pieces))}</pre>" for pieces in split["examples"]]
    parts += [f"<p>{_safe(note)}</p>" for note in found["notes"]]
    return _HTML.format(title=_safe(title), body="\n".join(parts))


def _piece(piece: Mapping[str, Any]) -> str:
    kinds = ["learned" if piece["learned"] else "masked", *(["special"] if piece["special"] else [])]
    return f'<span class="{" ".join(kinds)}">{_safe(piece["text"])}</span>'


def _safe(text: str) -> str:
    return escaping.escape(console_text(text))
