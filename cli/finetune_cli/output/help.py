"""How --help looks: what the command is for, how it is used, and examples to copy, in that order of need.

Commands write ordinary docstrings: paragraphs, and sections such as "Examples:" whose indented lines are shown as they
stand. Typer's own help draws boxes and types; this one leaves room for the words.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

if TYPE_CHECKING:
    from rich.text import Text

#: Columns beyond which prose is hard to read.
MAX_WIDTH = 100
_INDENT = "  "
#: Title of the one section that comes last.
EXIT_CODES = "Exit codes:"


def paragraphs(doc: str) -> list[tuple[str, list[str]]]:
    """Return a docstring as (title, lines): prose has no title and one line; a section keeps its lines as they are."""
    blocks: list[tuple[str, list[str]]] = []
    for block in inspect.cleandoc(doc).split("\n\n"):
        first, *rest = block.split("\n")
        if first.endswith(":") and rest and all(line.startswith("  ") for line in rest):
            blocks.append((first, [line.removeprefix("    ") for line in rest]))
        else:
            blocks.append(("", [" ".join([first, *rest])]))
    return blocks


def _example(line: str) -> Text:
    """Return a line of a section: the command bright, its remark after two spaces and a # dim."""
    from rich.text import Text

    command, mark, remark = line.partition("  #")
    return Text.assemble(_INDENT, (command, "cyan"), (mark + remark, "dim"))


def _rows(params: list[Any]) -> list[tuple[str, str]]:
    rows = []
    for param in params:
        if isinstance(param, TyperArgument):
            rows.append((str(param.metavar or param.name), param.help or ""))
        elif isinstance(param, TyperOption):
            # An option with a short form starts with it; the others are indented to the same column.
            flags = ", ".join(sorted([*param.opts, *param.secondary_opts], key=len))
            value = "" if param.is_flag else f" {param.metavar or (param.name or '').upper()}"
            rows.append((("" if len(param.opts) > 1 else "    ") + flags + value, param.help or ""))
    return rows


def _section(screen: Any, title: str, rows: list[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from finetune_cli.output import console

    if not rows:
        return
    screen.print(Text(f"\n{title}:", style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for left, right in rows:
        table.add_row(Text(_INDENT + left, style="cyan"), Text(right))
    console.page(table)


def _usage(command: Any, path: str) -> str:
    if isinstance(command, TyperGroup):
        return f"{path} COMMAND [OPTIONS]"
    arguments = [p for p in command.params if isinstance(p, TyperArgument)]
    shown = [str(p.metavar or p.name) if p.required else f"[{p.metavar or p.name}]" for p in arguments]
    return " ".join([path, *shown, "[OPTIONS]"])


def show(command: Any, context: Any) -> None:
    """Print the help of `command` to stdout."""
    from rich.text import Text

    from finetune_cli.output import console

    screen = console.out()
    screen.width = min(screen.width, MAX_WIDTH)
    (_, [summary]), *rest = paragraphs(command.help or "")
    screen.print(Text(summary))
    screen.print(Text.assemble(("\nUsage: ", "bold"), _usage(command, context.command_path)), soft_wrap=True)
    for _, lines in (block for block in rest if not block[0]):
        screen.print(Text("\n" + lines[0]))
    sections = dict(block for block in rest if block[0])
    exit_codes = sections.pop(EXIT_CODES, [])
    for title, lines in sections.items():
        screen.print(Text(f"\n{title}", style="bold"))
        for line in lines:
            screen.print(_example(line), soft_wrap=True)
    if isinstance(command, TyperGroup):
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in command.list_commands(context):
            child: Any = command.get_command(context, name)
            if child and not child.hidden:
                (_, [line]), *_ = paragraphs(child.help or "")
                panels.setdefault(child.rich_help_panel or "Commands", []).append((name, line))
        for title, rows in panels.items():
            _section(screen, title, rows)
    params = [param for param in command.get_params(context) if not getattr(param, "hidden", False)]
    _section(screen, "Arguments", _rows([p for p in params if isinstance(p, TyperArgument)]))
    by_panel: dict[str, list[Any]] = {"Options": []}
    for option in (p for p in params if isinstance(p, TyperOption)):
        by_panel.setdefault(option.rich_help_panel or "Options", []).append(option)
    for title, options in by_panel.items():
        _section(screen, title, _rows(options))
    codes = [line.split(maxsplit=1) for line in exit_codes]
    _section(screen, EXIT_CODES.rstrip(":"), [(number, meaning) for number, meaning in codes])
    if isinstance(command, TyperGroup):
        screen.print(Text(f"\nMore about one: {context.command_path} COMMAND --help"))


class Command(TyperCommand):
    """A command with this module's help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        show(self, ctx)


class Group(TyperGroup):
    """The command line with this module's help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        show(self, ctx)
