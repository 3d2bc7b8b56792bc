"""Arguments and options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune_cli import manifests

CLUSTER_PANEL = "Cluster"


class OutputFormat(StrEnum):
    """Forms of output for programs."""

    JSON = "json"
    YAML = "yaml"


def complete_job(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the cluster's jobs, for the shell; none when it is out of reach."""
    from finetune_cli.kube.connect import connect

    given = ctx.params
    try:
        cluster = connect(given.get("namespace"), given.get("context"), given.get("kubeconfig"), seconds=2)
        found = [str(job["metadata"]["name"]) for job in cluster.jobs().items]
    except Exception:
        # A shell asks at every Tab: silence is the only good answer to whatever went wrong.
        return []
    return [name for name in found if name.startswith(incomplete)]


ManifestFile = Annotated[
    str,
    typer.Argument(
        metavar="FILE", help="Manifest of a FineTuneJob or FineTuneSweep, or - for stdin.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override a field of spec, such as training.learningRate=1e-4. Repeatable.",
        show_default=False,
    ),
]


def _job_name(value: str) -> str:
    return manifests.job_name(value)


JobName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of a FineTuneJob.",
        show_default=False,
        autocompletion=complete_job,
        callback=_job_name,
    ),
]
IsSweep = Annotated[bool, typer.Option("--sweep", help="NAME is a FineTuneSweep.")]
AdapterSource = Annotated[
    str,
    typer.Argument(
        metavar="NAME|URI",
        help="A FineTuneJob, or where an adapter lies (s3://, file://, or a path such as ./nli).",
        show_default=False,
        autocompletion=complete_job,
    ),
]
OtherBase = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="Take the base model from this folder or URI, not from where the job had it.",
        show_default=False,
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        "-n",
        help="Namespace. Default: the context's.",
        show_default=False,
        rich_help_panel=CLUSTER_PANEL,
    ),
]
Context = Annotated[
    str | None,
    typer.Option(
        "--context",
        help="Context of the kubeconfig. Default: the current one.",
        show_default=False,
        rich_help_panel=CLUSTER_PANEL,
    ),
]
Kubeconfig = Annotated[
    Path | None,
    typer.Option(
        "--kubeconfig",
        help="Kubeconfig file. Default: $KUBECONFIG, else ~/.kube/config.",
        show_default=False,
        rich_help_panel=CLUSTER_PANEL,
    ),
]
Output = Annotated[
    OutputFormat | None,
    typer.Option("--output", "-o", metavar="json|yaml", help="Print data for programs instead.", show_default=False),
]


def duration(given: str) -> float:
    """Return the seconds of a duration such as 90, 45s, 30m, 1.5h or 1h30m."""
    from finetune_api import durations

    seconds = durations.seconds(given.strip())
    if not seconds:
        raise typer.BadParameter(f"{given!r} is no duration: write 90 (seconds), 45s, 30m, 4h, 1h30m or 1d")
    return seconds
