"""Where the command line writes: results to stdout, everything said about them to stderr.

Whatever is printed may come from a cluster, a store or a pod: it is never markup, and no terminal obeys it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

#: Columns of a page that goes to a file or a pipe, which have no width of their own.
PIPED_WIDTH = 120
#: The same for a table of which programs read each line.
PIPED_TABLE_WIDTH = 1000


class ReaderGoneError(Exception):
    """Who reads our output through a pipe (head, less) has seen enough."""


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    from finetune_api.plain_text import plain

    class SafeConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            # Everything printed passes here, tables and live pages too. Rich's own colors are not in the text.
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=plain(segment.text))

        def on_broken_pipe(self) -> None:
            # Rich would exit 1 here, which is no news under `set -o pipefail`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
            raise ReaderGoneError

    # markup and highlight are off: names and messages come from users and clusters.
    console = SafeConsole(stderr=stderr, markup=False, highlight=False, soft_wrap=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console


@cache
def out() -> Console:
    """Return the console on stdout."""
    return _console(stderr=False)


@cache
def err() -> Console:
    """Return the console on stderr."""
    return _console(stderr=True)


def page(content: RenderableType, width: int = 0) -> None:
    """Print a page or a table. In a pipe no line ends in spaces, and `width` columns may be used."""
    screen = out()
    if screen.is_terminal or "COLUMNS" in os.environ:
        screen.print(content)
        return
    with screen.capture() as captured:
        screen.print(content, width=max(screen.width, width))
    screen.print("\n".join(line.rstrip() for line in captured.get().splitlines()), soft_wrap=True)


def piece(text: str) -> None:
    """Print a piece of a line that goes on, such as an answer that is being made."""
    out().print(text, end="", soft_wrap=True)


def note(message: str) -> None:
    """Say something beside the result, on stderr."""
    err().print(message, style="dim", soft_wrap=True)


def print_error(message: str, hint: str = "") -> None:
    """Say what went wrong and what to do. Lines are never broken by us, so that they can be searched."""
    from rich.text import Text

    for line in message.splitlines():
        err().print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)
    if hint:
        err().print(Text.assemble(("hint:  ", "bold cyan"), hint), soft_wrap=True)


def done(message: str) -> None:
    """Say on stdout that something is done."""
    from rich.text import Text

    out().print(Text.assemble(("✓ ", "bold green"), message), soft_wrap=True)


def structured(data: object, form: str) -> None:
    """Print `data` as JSON or YAML, for programs. What a terminal would obey is escaped, so that no value changes."""
    from finetune_api.plain_text import plain

    written = _dump(data, form, as_ascii=False)
    out().print(written if plain(written) == written else _dump(data, form, as_ascii=True), soft_wrap=True)


def _dump(data: object, form: str, *, as_ascii: bool) -> str:
    if form == "json":
        import json

        # JSON escapes all controls but DEL.
        return json.dumps(data, indent=2, ensure_ascii=as_ascii).replace("\x7f", "\\u007f" if as_ascii else "\x7f")
    import yaml

    return yaml.safe_dump(data, sort_keys=False, allow_unicode=not as_ascii).rstrip("\n")


def structured_job(job: dict[str, Any], form: str) -> None:
    """Print a FineTuneJob as the cluster returned it, without the bookkeeping of who set which field."""
    metadata = {key: value for key, value in job["metadata"].items() if key != "managedFields"}
    structured({**job, "metadata": metadata}, form)


def next_commands(*commands: str) -> None:
    """Show what to type next."""
    from rich.text import Text

    out().print(Text("\nNext:", style="bold"))
    for command in commands:
        typed, mark, remark = command.partition("   #")
        out().print(Text.assemble("  ", (typed, "cyan"), (mark + remark, "dim")), soft_wrap=True)
