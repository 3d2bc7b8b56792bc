"""`finetune run`: the trainer that the image runs, on this machine, with the same manifest."""

from __future__ import annotations

import os
import tempfile
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune_api import constants
from finetune_cli.errors import CliError, Exit
from finetune_cli.local_run import (
    check_local,
    environment,
    launcher,
    supervise,
    trainer_arguments,
    trainer_command,
    trainers_code,
)
from finetune_cli.options import ManifestFile, Overrides


class LogForm(StrEnum):
    """How the trainer writes its log."""

    TEXT = "text"
    JSON = "json"


def run(
    file: ManifestFile,
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary at the end.")] = False,
    log: Annotated[
        LogForm | None,
        typer.Option(
            "--log", help="How the log is written. Default: text on a terminal, else json.", show_default=False
        ),
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Train the trials of a sweep together, in one process.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="In text: every detail of each line.")] = False,
) -> None:
    """Train on this machine: no cluster, the same trainer as in the image.

    A GPU is used when there is one. The adapter goes to output.uri, checkpoints beside it: run the same command
    again after an interruption and it resumes. Credentials come from the environment (AWS_*, HF_TOKEN).

    Of a sweep, the trials run one after the other; one that fails takes no other along. The table at the end has the
    best first. Trials that are published already are not run again, unless output.overwrite is true. With --packed,
    trials that differ only in lora and in the optimizer's fields of training share a process and its base model, up to
    parallelism of them in each pass.

    Examples:
        finetune run job.yaml
        finetune run job.yaml --set training.learningRate=1e-4 --set lora.rank=32
        finetune run job.yaml --set training.maxSteps=5 --set output.uri=file:///tmp/trial
        finetune run job.yaml --log text 2>&1 | tee run.log
        finetune run sweep.yaml --set template.training.maxSteps=50
        finetune run sweep.yaml --packed

    Exit codes:
        0    the adapter is published and was loaded back; of a sweep, at least one trial's
        1    the manifest is wrong, or asks for what only a cluster has
        65   the data set is wrong
        69   the store or the model hub is out of reach
        75   stopped, with a checkpoint to resume from
        77   the store or the hub denied access
        78   the manifest asks for something that cannot be done, or the run does not fit the GPU
        90   the GPU ran out of memory
        91   the loss became NaN or infinite
    """
    from finetune_api import manifest
    from finetune_cli.manifests import refused, the_job
    from finetune_cli.output import run_summary

    source, document = the_job(file, or_sweep=True)
    if document.is_sweep:
        from finetune_cli.local_sweep import run_sweep

        run_sweep(document, source.base, overrides or (), quiet=quiet, packed=packed)
        return
    if packed:
        raise CliError("--packed is for a FineTuneSweep, and this is a FineTuneJob")
    try:
        job = manifest.check(document, source.base, overrides or ())
    except manifest.ManifestError as error:
        raise refused(error) from None
    trainer = trainer_command()
    check_local(job, os.environ)

    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        env = environment(os.environ, Path(folder))
        started = time.monotonic()
        arguments = trainer_arguments(source, job, overrides or (), Path(folder))
        arguments += [*(["--log", log] if log else []), *(["--verbose"] if verbose else [])]
        code = supervise([*launcher(job, trainer), *arguments], env)
        report = run_summary.read_report(Path(env[constants.ENV_TERMINATION_LOG]))
        code = trainers_code(code, report)
    if not quiet:
        run_summary.show(job, report, code, seconds=time.monotonic() - started, file=file)
    if code != Exit.OK:
        raise CliError("", code=code)
