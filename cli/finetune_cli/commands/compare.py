"""`finetune compare`: several runs beside each other."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.errors import CliError
from finetune_cli.manifests import job_name
from finetune_cli.options import Context, Kubeconfig, Namespace, complete_job
from finetune_cli.output import console

if TYPE_CHECKING:
    from finetune_cli.comparison.runs import Run
    from finetune_cli.kube.client import Cluster

#: Runs that are compared at most, as many as a sweep can have.
MAX_RUNS = 1000


class Form(StrEnum):
    """Forms of the table."""

    JSON = "json"
    CSV = "csv"
    MARKDOWN = "markdown"


def compare(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME|URI]...",
            help="FineTuneJobs, or where adapters lie (s3://, file://, or paths such as ./nli).",
            show_default=False,
            autocompletion=complete_job,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="NAME", help="Compare the trials of this FineTuneSweep.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Also write a page with loss curves, confusion matrices and answers.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Form | None,
        typer.Option(
            "--output",
            "-o",
            metavar="json|csv|markdown",
            help="Print the table for programs or documents instead.",
            show_default=False,
        ),
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Compare runs: what differs in their specs, their metrics before and after, training time and GPU-hours.

    Runs are jobs of the cluster, the trials of a sweep (the best first), or published adapters, all in one table. The
    page of --html is one file without scripts; it shows the answers of the first two runs to the same held-out rows,
    where they were published (training/answers.jsonl).

    Examples:
        finetune compare nli-r16 nli-r32
        finetune compare --sweep nli --html report.html
        finetune compare s3://adapters/nli/lr1e-4 s3://adapters/nli/lr2e-4 -o csv
        finetune compare ./before ./after -o markdown

    Exit codes:
        0    all runs were read
        1    the input is wrong
        3    the cluster or a store is out of reach, or access is denied
        5    a file is not what its manifest says, or an adapter not what its job published
    """
    from finetune_cli.kube.connect import connect

    def cluster() -> Cluster:
        return connect(namespace, context, kubeconfig)

    found, title = _read(sources or [], sweep, cluster, whole=html is not None)
    if html:
        _write(html, title, found)
    _print(found, output)
    if html:
        console.note(f"The page is written to {html}")


def _read(
    sources: list[str], sweep: str | None, cluster: Callable[[], Cluster], *, whole: bool
) -> tuple[list[Run], str]:
    from finetune_cli.comparison.reading import read_all, read_sweep

    if sweep is not None:
        if sources:
            raise CliError("give either runs or --sweep")
        _, found = read_sweep(job_name(sweep), cluster(), whole=whole)
        return found, f"Sweep {sweep}"
    given, sources = len(sources), list(dict.fromkeys(sources))
    if len(sources) < given and len(sources) < 2:
        raise CliError(f"{sources[0]} is given twice: compare takes two different runs or more")
    if len(sources) < 2:
        raise CliError(
            "compare takes two runs or more, or --sweep NAME",
            hint="finetune compare JOB ./adapter; finetune list shows the jobs",
        )
    if len(sources) > MAX_RUNS:
        raise CliError(f"{len(sources):,} runs; at most {MAX_RUNS:,} are compared")
    for source in sources:
        if "/" not in source:
            job_name(source, or_path=True)
    found = read_all(sources, cluster, whole=whole)
    return found, " · ".join(run.name for run in found) if len(found) <= 4 else f"{len(found)} runs"


def _print(found: list[Run], output: Form | None) -> None:
    from finetune_cli.comparison import table

    if output == Form.JSON:
        console.structured(table.data(found), "json")
    elif output:
        text = table.as_csv(found) if output == Form.CSV else table.as_markdown(found)
        console.out().print(text, soft_wrap=True)
    else:
        console.page(table.table(found), console.PIPED_TABLE_WIDTH)
        if more := table.left_out(found):
            console.note(f"{more} more values differ: -o json and --html show them")


def _write(file: Path, title: str, found: list[Run]) -> None:
    from finetune_cli.comparison.report import page

    try:
        file.write_text(page(title, found, datetime.now(UTC)), encoding="utf-8")
    except OSError as error:
        raise CliError(f"--html: {file}: cannot be written: {error.strerror}") from None
