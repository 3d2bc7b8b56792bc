"""The command line of `finetune-trainer`, its help, and its exit code.

`finetune-trainer --config job.yaml` is the whole interface: in a pod, under `docker run`, under torchrun, and for
`finetune run`, which starts it as a subprocess with FINETUNE_TERMINATION_LOG set to a file of its own. The exit code
(finetune_api.exit_codes.ExitCode) says how the run ended; that file holds the final TrainerReport as JSON.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn, get_args

import structlog
from rich.console import Console

from finetune_api import constants, exit_codes
from finetune_api.manifest import ManifestError, load_sweep
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.context import RunContext
from finetune_trainer.errors import ConfigInvalid, Preempted, failure_of
from finetune_trainer.reporting import logs
from finetune_trainer.reporting.metrics_log import MetricsLog
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.reporting.setup import show
from finetune_trainer.run import run
from finetune_trainer.runtime.environment import set_defaults
from finetune_trainer.runtime.signals import StopFlag, stop_on_signals
from finetune_trainer.runtime.workspace import work_folder
from finetune_trainer.settings import Environment, Ranks, load

log = structlog.get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line names; return the exit code, whatever happens."""
    options = parser().parse_args(argv)
    environment, ranks = Environment.from_env(), Ranks.from_env()
    set_defaults(environment.scratch)
    has_bar = sys.stderr.isatty() and ranks.is_main and options.log != "json"
    console = Console(stderr=True) if has_bar else None
    logs.configure(console, options.log, details=options.verbose)
    reporter = Reporter(environment.termination_log)
    if ranks.local_rank == 0:
        reporter.clear_termination_log()
    stop = StopFlag(lambda: force_exit(reporter))
    try:
        with stop_on_signals(stop, alone=ranks.size == 1), ExitStack() as exit_stack:
            if sweep := load_sweep(options.config, options.set):
                if options.warm_up:
                    raise ConfigInvalid("--warm-up is for a FineTuneJob, and this is a FineTuneSweep")
                from finetune_trainer.packing.sweep import run_sweep

                run_sweep(*sweep, environment, ranks, stop, reporter, console, exit_stack)
            else:
                settings = load(options.config, options.set, environment, ranks, options.warm_up)
                directory = RunDirectory(exit_stack.enter_context(work_folder(settings)))
                logs.copy_to(directory.root / logs.LOG_FILE)
                telemetry = show(exit_stack, settings, reporter, console)
                metrics = MetricsLog(directory.metrics_file, telemetry.track)
                run(RunContext(settings, stop, reporter, telemetry, metrics, directory, exit_stack))
    except BaseException as error:
        failure = failure_of(error)
        unforeseen = not isinstance(error, ManifestError) and failure.exit_code == 1
        log.error(failure.message, reason=failure.reason, exit_code=failure.exit_code, exc_info=unforeseen)
        reporter.failed(failure)
        return failure.exit_code
    if ranks.is_main:
        log.info(reporter.report.message)
    return 0


def cli() -> None:
    """Entry point of the `finetune-trainer` command."""
    sys.exit(main())


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options; its help also explains environment variables and exit codes."""
    codes = "\n".join(
        f"  {outcome.code:>3}  {outcome.reason:<16} {outcome.cause}"
        for outcome in sorted(exit_codes.REASONS.values(), key=lambda outcome: outcome.code)
    )
    environment = "\n".join(
        f"  {name:<26} {text}"
        for name, text in (
            (constants.ENV_SCRATCH_DIR, f"folder for temporary files (default {constants.SCRATCH_DIR})"),
            (constants.ENV_CACHE_DIR, "folder for downloaded models, may be shared by jobs"),
            (
                constants.ENV_SECRETS_DIR,
                f"folder with {', '.join(constants.SECRET_ROLES)} (default {constants.SECRETS_DIR})",
            ),
            (constants.ENV_PVC_ROOT, f"where pvc:// claims are mounted (default {constants.PVC_ROOT})"),
            (constants.ENV_LISTEN, f"address of /metrics and /progress (default 0.0.0.0:{constants.TRAINER_PORT})"),
            (
                "MLFLOW_TRACKING_URI",
                "an MLflow server to send every metric to; other MLFLOW_* variables are honored too",
            ),
            (constants.ENV_TERMINATION_LOG, f"file for the final report (default {constants.TERMINATION_LOG})"),
        )
    )
    result = argparse.ArgumentParser(
        prog=constants.TRAINER_COMMAND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a LoRA adapter as a FineTuneJob manifest says, publish it, and load it back to be sure.\n"
        "Credentials come from the environment (AWS_ACCESS_KEY_ID, HF_TOKEN, …) or from the secrets folder.",
        epilog=f"examples:\n"
        f"  {constants.TRAINER_COMMAND} --config job.yaml\n"
        f"  {constants.TRAINER_COMMAND} --config job.yaml --set training.learningRate=1e-4"
        f" --set resources.gpusPerNode=0\n"
        f"  torchrun --nproc-per-node 2 -m finetune_trainer --config job.yaml\n\n"
        f"environment:\n{environment}\n\n"
        f"exit codes:\n{codes}\n    1  Error            Anything else; the log has the traceback.\n",
    )
    result.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="FILE",
        help="the manifest of a FineTuneJob, or of a FineTuneSweep whose trials share one GPU (YAML or JSON)",
    )
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="set a field below spec, over the file; may be given more than once",
    )
    result.add_argument(
        "--log", choices=get_args(logs.Form), help="text or JSON lines (default: text on a terminal, JSON elsewhere)"
    )
    result.add_argument("--verbose", "-v", action="store_true", help="with text: every detail of each line")
    result.add_argument(
        "--warm-up",
        action="store_true",
        help=f"train nothing: fill {constants.ENV_CACHE_DIR} with what the job needs (model, data, compiled code, base"
        " model's metrics), for jobs that share it or for an image",
    )
    return result


def force_exit(reporter: Reporter) -> NoReturn:
    """End a process that was asked to stop and still hangs; all that can be saved is saved."""
    failure = failure_of(Preempted("Forced exit after the grace period; saved checkpoints are intact"))
    log.error(failure.message, reason=failure.reason, exit_code=failure.exit_code)
    reporter.failed(failure)
    os._exit(failure.exit_code)
