"""`finetune chat`: ask a published adapter, on this machine."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import suppress
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli.errors import CliError
from finetune_cli.local_trainer import (
    LocalAdapter,
    base_model_errors,
    explained,
    published_adapter,
    quiet,
    require_trainer,
)
from finetune_cli.options import AdapterSource, Context, Kubeconfig, Namespace, OtherBase
from finetune_cli.output import console
from finetune_cli.published import locate

if TYPE_CHECKING:
    from finetune_trainer.chat.prompts import Prompt
    from finetune_trainer.chat.session import ChatSession

#: Rows of a file that are answered together.
_ROWS_AT_ONCE = 16
_HELP = "A line is a question. /new begins a new conversation; Ctrl-C ends an answer, Ctrl-D the chat."


class Form(StrEnum):
    """How a question is written for the model."""

    CHAT = "chat"
    TEXT = "text"


def chat(
    source: AdapterSource,
    once: Annotated[
        str | None, typer.Option("--once", metavar="PROMPT", help="Answer this and end.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", metavar="ROWS", help="Answer each row of a data file, as JSON Lines.", show_default=False
        ),
    ] = None,
    base_too: Annotated[bool, typer.Option("--base-too", help="Let the base model answer first, as well.")] = False,
    base: OtherBase = None,
    form: Annotated[
        Form | None,
        typer.Option(
            "--form",
            metavar="chat|text",
            help="Write prompts in the chat template, or leave them as they are. Default: as in training.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            min=1,
            max=8192,
            help="Tokens of an answer at most. Default: the job's evaluation.generation.maxNewTokens.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the base model's repository brings.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Ask a published adapter, on this machine's GPU or CPU.

    The adapter is fetched as by finetune download, every byte compared with its manifest, and kept in the cache. It
    answers on the base model that it was trained on (same commit, same quantization), in its chat template, and stops
    where it learned to stop. The same question gets the same answer: decoding is greedy.

    With --file, rows are in the format of the training data, with or without answers: each line printed is an object
    with prompt, answer, with --base-too baseAnswer, and expected where the row has an answer.

    Examples:
        finetune chat nli
        finetune chat s3://adapters/nli --once "Does it follow?" --base-too
        finetune chat ./nli --file eval.jsonl > answers.jsonl
        finetune chat nli --base ./models/Mistral-7B-v0.3

    Exit codes:
        0    all is well
        1    the input is wrong, or the base model is not here
        3    the store or the hub is out of reach, or access is denied
        5    a file does not match its digest
        130  interrupted
    """
    if once is not None and file is not None:
        raise CliError("--once and --file exclude each other")
    if file is not None and not file.is_file():
        raise CliError(f"{file}: no such file")
    require_trainer("answering")
    published = locate(source, namespace, context, kubeconfig, "finetune chat {}", adapters_only=True)
    with explained(), tempfile.TemporaryDirectory(prefix="finetune-chat-") as work:
        changes = ["model.trustRemoteCode=true"] if trust_remote_code else []
        adapter = published_adapter(published, Path(work), base, changes)
        with quiet(), base_model_errors():
            session = _session(adapter, Path(work), form, max_tokens)
        with quiet():
            if file is not None:
                _answer_rows(session, file, base_too)
            elif once is not None:
                _answer(session, once, base_too)
            else:
                _converse(session, base_too)


def _session(adapter: LocalAdapter, work: Path, form: Form | None, max_tokens: int | None) -> ChatSession:
    """Load base model and adapter, behind a line on stderr that says which."""
    with console.err().status(f"Loading the base model {adapter.settings.spec.model.source} and the adapter"):
        from finetune_trainer.chat.session import ChatSession

        return ChatSession.open(
            adapter.folder, adapter.settings, work, form=form.value if form else None, max_new_tokens=max_tokens
        )


def _answer(session: ChatSession, text: str, base_too: bool) -> str:
    """Print the answer to `text` as it is made."""
    from finetune_trainer.data.jinja import TemplateError

    try:
        prompt = session.ask(text)
    except TemplateError as error:
        raise CliError(f"the conversation {error}", hint="--form text leaves the prompt as it is") from None
    if base_too:
        _print_title("base")
        _stream(session, prompt, base=True)
        _print_title("adapter")
    return _stream(session, prompt)


def _stream(session: ChatSession, prompt: Prompt, *, base: bool = False) -> str:
    try:
        return session.answer(prompt, console.piece, base=base)
    finally:
        console.piece("\n")


def _print_title(name: str) -> None:
    console.out().print(f"[{name}]", style="bold")


def _answer_rows(session: ChatSession, file: Path, base_too: bool) -> None:
    rest = session.rows(file)
    while batch := list(islice(rest, _ROWS_AT_ONCE)):
        bases = session.answers(batch, base=True) if base_too else None
        for index, (prompt, answer) in enumerate(zip(batch, session.answers(batch), strict=True)):
            found: dict[str, Any] = {"prompt": prompt.text}
            if bases:
                found["baseAnswer"] = bases[index].strip()
            found["answer"] = answer.strip()
            if prompt.expected is not None:
                found["expected"] = prompt.expected
            console.out().print(json.dumps(found), soft_wrap=True)


def _converse(session: ChatSession, base_too: bool) -> None:
    console.note(_HELP)
    while (line := _read_line()) is not None:
        if line == "/new":
            session.forget()
            console.note("A new conversation")
            continue
        if not line:
            continue
        try:
            with suppress(KeyboardInterrupt), explained():
                session.remember(line, _answer(session, line, base_too))
        except CliError as error:
            console.print_error(error.message, "/new begins a new conversation")


def _read_line() -> str | None:
    """Return the next line that is typed, or that stdin holds; None at the end."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 -- input() then has a history and edits
        try:
            return input("> ").strip()
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None
