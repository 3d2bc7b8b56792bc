"""The command line of `finetune-trainer`, and its help."""

import argparse
from pathlib import Path

from finetune_api import constants, exit_codes


def parser() -> argparse.ArgumentParser:
    """--config and --set; the help also explains environment variables and exit codes."""
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
            ("MLFLOW_TRACKING_URI", "an MLflow server to send every metric to; its other variables hold, too"),
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
        f"  torchrun --nproc-per-node 2 -m finetune_trainer.main --config job.yaml\n\n"
        f"environment:\n{environment}\n\n"
        f"exit codes:\n{codes}\n    1  Error            Anything else; the log has the traceback.\n",
    )
    result.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="the FineTuneJob manifest (YAML or JSON)"
    )
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="set a field below spec, over the file; may be given more than once",
    )
    return result
