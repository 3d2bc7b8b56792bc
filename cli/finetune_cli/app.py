"""The `finetune` command line, also installed as the kubectl plugin `kubectl-finetune`.

`finetune --help` has to be there at once, so command modules import nothing heavy at module level: kubernetes, boto3,
pydantic and the trainer are imported by the functions that need them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from finetune_cli import usage
from finetune_cli.commands import (
    chat,
    compare,
    delete,
    download,
    export,
    init,
    inspect,
    lineage,
    list_jobs,
    logs,
    plan,
    promote,
    run,
    serve_manifest,
    status,
    submit,
    suspend,
    validate,
    watch,
)
from finetune_cli.errors import CliError, Exit
from finetune_cli.output.console import ReaderGoneError, print_error
from finetune_cli.output.help import Command, Group

LOCAL = "On this machine"
CLUSTER = "In the cluster"
RESULTS = "The adapter"

app = typer.Typer(
    name="finetune",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(_version_line())
        raise typer.Exit


def _version_line() -> str:
    from importlib.metadata import version

    return f"finetune {version('finetune-operator')}"


@app.callback()
def finetune(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune language models: one FineTuneJob manifest in, one verified LoRA adapter out.

    First steps:
        finetune init                    # write job.yaml
        finetune validate job.yaml       # is the manifest right?
        finetune inspect job.yaml        # what will be learned of the data?
        finetune plan job.yaml           # what will it do, and will it fit?
        finetune run job.yaml            # train here, without a cluster
        finetune submit job.yaml         # train in the cluster
        finetune watch my-job            # see it train
        finetune download my-job ./out   # fetch the adapter
        finetune chat my-job             # ask it

    Exit codes:
        0    all is well
        1    your input is wrong: a manifest, an option, a name
        2    the job failed
        3    the cluster or the store is out of reach, or access is denied
        4    the wait timed out
        5    a download does not match its digest
        130  interrupted
    """


def _register(function: Callable[..., None], panel: str, name: str | None = None) -> None:
    app.command(name, cls=Command, rich_help_panel=panel)(function)


_register(init.init, LOCAL)
_register(validate.validate, LOCAL)
_register(inspect.inspect, LOCAL)
_register(plan.plan, LOCAL)
_register(run.run, LOCAL)
_register(submit.submit, CLUSTER)
_register(list_jobs.list_jobs, CLUSTER, "list")
_register(status.status, CLUSTER)
_register(watch.watch, CLUSTER)
_register(logs.logs, CLUSTER)
_register(suspend.suspend, CLUSTER)
_register(suspend.resume, CLUSTER)
_register(delete.delete, CLUSTER)
_register(download.download, RESULTS)
_register(chat.chat, RESULTS)
_register(export.export, RESULTS)
_register(lineage.lineage, RESULTS)
_register(serve_manifest.serve_manifest, RESULTS, "serve-manifest")
_register(promote.promote, RESULTS)
_register(promote.rollback, RESULTS)
_register(compare.compare, RESULTS)


@app.command("version", cls=Command, rich_help_panel=LOCAL)
def version_command() -> None:
    """Print the version, as --version does."""
    typer.echo(_version_line())


def main() -> int:
    """Run the command line and return its exit code."""
    # Advice on optional CPU kernels as it is imported; each retry, which our own sentence sums up.
    for library in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    name = "kubectl finetune" if Path(sys.argv[0]).name.startswith("kubectl-") else "finetune"
    try:
        # Not standalone: Typer's exit code for a wrong option is 2, which here says that a job failed.
        code = app(prog_name=name, standalone_mode=False)
    except CliError as error:
        if error.message:
            print_error(error.message, error.hint)
        return error.code
    except (KeyboardInterrupt, typer.Abort):
        return int(Exit.INTERRUPTED)
    except ReaderGoneError:
        return int(Exit.OK)
    except Exception as error:
        if (said := usage.explain(error, name)) is None:
            raise
        if said[0]:
            print_error(*said)
        return int(Exit.INVALID)
    return code if isinstance(code, int) else int(Exit.OK)
