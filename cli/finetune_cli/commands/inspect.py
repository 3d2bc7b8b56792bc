"""`finetune inspect`: what the rows of a data set are, and what a model would learn of them, before any GPU."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_api import constants
from finetune_cli.errors import CliError
from finetune_cli.local_trainer import explained, quiet
from finetune_cli.options import Output, Overrides
from finetune_cli.output import console

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJob
    from finetune_trainer.inspection import Inspection


#: Name of a manifest that the command line stands for.
_TYPED = "the command line"


def inspect(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATASET|FILE",
            help="Data file or folder, s3:// or hf:// URI of one, or the manifest (.yaml) of a FineTuneJob.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Model whose tokenizer counts: a folder or a URI."),
    ] = None,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=0, max=1000, help="Rows to show.")] = 3,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page for a browser, too.", show_default=False)
    ] = None,
    output: Output = None,
) -> None:
    """Show what a data set's rows are, and what is learned of them. No GPU is needed, and no weights.

    Format, rows, lengths in tokens, rows that training.maxLength cuts, duplicates, held-out rows that are also trained
    on, rows that cannot be used, and the first rows: what is learned, what is not, special tokens in brackets.

    Examples:
        finetune inspect train.jsonl --model hf://Qwen/Qwen2.5-7B-Instruct
        finetune inspect hf://datasets/owner/chats --model ./model --set training.maxLength=2048
        finetune inspect s3://data/train/ --model ./model --set dataset.evalFraction=0.05
        finetune inspect job.yaml --rows 20 --html rows.html
        finetune inspect job.yaml -o json

    Exit codes:
        0    every row can be used
        1    rows cannot be used, or the input is wrong
        3    the store is out of reach, or access is denied
    """
    from finetune_cli.output import rows_page

    try:
        job = _job(data, model, overrides)
        with explained():
            found = _inspection(job, rows)
    except CliError as error:
        raise _as_typed(error) if model else error from None
    result = asdict(found)
    if html:
        try:
            html.write_text(rows_page.html(result, data), encoding="utf-8")
        except OSError as error:
            raise CliError(f"{html}: cannot be written: {error.strerror}") from None
    if output:
        console.structured(result, output)
    else:
        rows_page.show(result)
    bad = sum(split.bad for split in found.splits)
    if bad:
        raise CliError(f"{bad} row{'s' if bad > 1 else ''} cannot be used")


def _job(data: str, model: str | None, overrides: list[str] | None) -> FineTuneJob:
    """Return the job of a manifest, or one that would train `model` on `data`."""
    from finetune_api import manifest
    from finetune_cli.manifests import Source, documents, refused, the_job

    if data == "-" or data.endswith((".yaml", ".yml")):
        if model:
            raise CliError("--model goes with a data set: a manifest names its own", hint="--set model.source=URI")
        source, document = the_job(data)
    else:
        if not model:
            raise CliError(
                "a data set needs --model, whose tokenizer counts its tokens", hint="--model hf://owner/name"
            )
        source = Source(_TYPED, _written(data, model), Path.cwd())
        [document] = documents(source)
    try:
        return manifest.check(document, source.base, overrides or ())
    except manifest.ManifestError as error:
        raise refused(error) from None


def _as_typed(error: CliError) -> CliError:
    """Return an error that names what was typed, not the field of a manifest that nobody wrote."""
    message = error.message.replace(f"{_TYPED}:1: ", "")
    for field, typed in (("model.source", "--model"), ("dataset.train", "DATASET")):
        message = re.sub(rf"\b(spec\.)?{re.escape(field)}(?=:)", typed, message)
    return CliError(message, hint=error.hint, code=error.code)


def _written(data: str, model: str) -> str:
    import json

    spec = {
        "model": {"source": _uri(model)},
        "dataset": {"train": _uri(data)},
        "output": {"uri": "s3://nothing-is-written/here"},
    }
    head = {"apiVersion": constants.API_VERSION, "kind": constants.KIND, "metadata": {"name": "inspected"}}
    return json.dumps(head | {"spec": spec}, ensure_ascii=False)


def _uri(place: str) -> str:
    """Return a URI as it is, and a path of this machine as one."""
    return place if "://" in place else f"file://{Path(place).resolve()}"


def _inspection(job: FineTuneJob, shown: int) -> Inspection:
    """Return what the trainer finds, behind a progress bar on stderr."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from finetune_cli.storage import cache_folder
    from finetune_trainer.inspection import inspect as inspect_rows
    from finetune_trainer.settings import Environment, Ranks, Settings

    env = {constants.ENV_CACHE_DIR: str(cache_folder(os.environ))} | os.environ
    columns: tuple[Any, ...] = (
        TextColumn("Reading rows"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
    )
    with (
        quiet(),
        tempfile.TemporaryDirectory(prefix="finetune-inspect-") as work,
        Progress(*columns, console=console.err(), transient=True, disable=not console.err().is_terminal) as progress,
    ):
        task = progress.add_task("rows", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        settings = Settings(job, Environment.from_env({constants.ENV_SCRATCH_DIR: work} | env), Ranks())
        return inspect_rows(settings, Path(work), shown, tell)
