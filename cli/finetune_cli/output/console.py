"""Where the command line writes: results to stdout, everything said about them to stderr. Never markup from data."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

#: Columns of a page that goes to a file or a pipe, which have no width of their own.
PIPED_WIDTH = 120
#: The same for a table of which programs read each line.
PIPED_TABLE_WIDTH = 1000


class ReaderGoneError(Exception):
    """Who reads our output through a pipe (head, less) has seen enough."""


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    class PipeAware(Console):
        def on_broken_pipe(self) -> None:
            # Rich would exit 1 here, which is no news under `set -o pipefail`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
            raise ReaderGoneError

    # markup and highlight are off: names and messages come from users and clusters.
    console = PipeAware(stderr=stderr, markup=False, highlight=False, soft_wrap=False, emoji=False)
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
    """Print `data` as JSON or YAML, for programs."""
    if form == "json":
        import json

        written = json.dumps(data, indent=2, ensure_ascii=False)
    else:
        import yaml

        written = yaml.safe_dump(data, sort_keys=False, allow_unicode=True).rstrip("\n")
    out().print(written, soft_wrap=True)


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
