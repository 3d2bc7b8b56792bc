"""The trainer that the image runs, as a process of this machine: its command, its environment, its end."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

from finetune_api import constants, exit_codes
from finetune_cli.errors import CliError, install_hint
from finetune_cli.manifests import STDIN_NAME
from finetune_cli.storage import cache_folder

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJob
    from finetune_api.status import TrainerReport
    from finetune_cli.manifests import Source

#: Packages of the trainer extra whose absence is the likeliest; one of each kind is enough to tell.
TRAINER_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
#: Device files of GPUs that have none of their own for each: WSL, AMD, Jetson.
_OTHER_GPUS = ("/dev/dxg", "/dev/kfd", "/dev/nvmap")
_PR_SET_PDEATHSIG = 1
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def trainer_command() -> str:
    """Path of finetune-trainer: beside this Python first, then on PATH. Raises CliError when it is not installed."""
    beside = Path(sys.executable).with_name(constants.TRAINER_COMMAND)
    command = str(beside) if beside.exists() else shutil.which(constants.TRAINER_COMMAND)
    missing = [package for package in TRAINER_PACKAGES if importlib.util.find_spec(package) is None]
    if command is None or missing:
        lacking = f" ({', '.join(missing)} missing)" if missing else ""
        raise CliError(
            f"the trainer is not installed here{lacking}",
            hint=f"{install_hint('trainer')}; or train in a cluster: finetune submit",
        )
    return command


def free_address() -> str:
    """Return a 127.0.0.1 address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def environment(env: Mapping[str, str], temporary: Path) -> dict[str, str]:
    """Return the trainer's environment: the user's; a path it leaves open is one of this user, not a pod's."""
    defaults = {
        # On a user's own machine the usual places are read; a trainer alone reads none of them.
        "AWS_CONFIG_FILE": "~/.aws/config",
        "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
        "AWS_EC2_METADATA_DISABLED": "false",
        constants.ENV_SCRATCH_DIR: str(temporary / "scratch"),
        constants.ENV_CACHE_DIR: str(cache_folder(env)),
        constants.ENV_LISTEN: free_address(),
        constants.ENV_TERMINATION_LOG: str(temporary / "termination-log"),
    }
    merged = defaults | dict(env)
    for folder in (constants.ENV_SCRATCH_DIR, constants.ENV_CACHE_DIR):
        try:
            Path(merged[folder]).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CliError(
                f"{merged[folder]}: cannot be made: {error.strerror}", hint=f"set {folder} to a folder you may write"
            ) from None
    return merged


def gpus_here() -> int | None:
    """NVIDIA GPUs of this machine, by their device files; None where those do not tell (WSL, Jetson, not Linux)."""
    if sys.platform != "linux" or any(Path(other).exists() for other in _OTHER_GPUS):
        return None
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def check_local(job: FineTuneJob, env: Mapping[str, str]) -> None:
    """Refuse what only a cluster can do. Raises CliError."""
    spec = job.spec
    if spec.resources.nodes > 1:
        raise CliError(
            f"spec.resources.nodes is {spec.resources.nodes}, and this is one machine",
            hint="add --set resources.nodes=1, or train in a cluster: finetune submit",
        )
    here = gpus_here()
    if here is not None and here < spec.resources.gpus_per_node:
        raise CliError(
            f"spec.resources.gpusPerNode is {spec.resources.gpus_per_node}, and this machine has {here or 'no GPU'}",
            hint=f"add --set resources.gpusPerNode={here} (0 is the CPU), or train in a cluster: finetune submit",
        )
    for field, uri in spec.uris.items():
        if uri.startswith("pvc://") and constants.ENV_PVC_ROOT not in env:
            raise CliError(
                f"spec.{field} is {uri}, a volume of a cluster",
                hint=f"set {constants.ENV_PVC_ROOT}=DIR to read pvc://claim/path from DIR/claim/path,"
                f" or add --set {field}=file://./…",
            )


def launcher(job: FineTuneJob, trainer: str) -> list[str]:
    """Return the start of the command: torchrun, one process per GPU, where there are several."""
    gpus = job.spec.resources.gpus_per_node
    if gpus < 2:
        return [trainer]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={gpus}",
        "--no-python",
        trainer,
    ]


def trainer_arguments(source: Source, job: FineTuneJob, overrides: Sequence[str], temporary: Path) -> list[str]:
    """Return the trainer's own arguments: the user's file where there is one, so that its messages name it."""
    if source.name != STDIN_NAME:
        return ["--config", source.name, *(part for override in overrides for part in ("--set", override))]
    import yaml

    config = temporary / constants.CONFIG_FILE
    config.write_text(yaml.safe_dump(job.manifest(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return ["--config", str(config)]


def trainers_code(code: int, report: TrainerReport | None) -> int:
    """Return the trainer's exit code. torchrun ends with 1 whatever its processes ended with; the report tells."""
    outcome = exit_codes.REASONS.get(report.reason or "") if code == 1 and report else None
    return int(outcome.code) if outcome else code


def _in_foreground() -> bool:
    """Whether the terminal's Ctrl-C reaches the trainer without our help."""
    try:
        with Path("/dev/tty").open("rb", buffering=0) as terminal:  # stdin may be a manifest
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def _wait(process: subprocess.Popen[bytes], tick: Callable[[], bool] | None) -> int:
    while tick is not None:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if tick():
                process.terminate()
                break
    return process.wait()


def _end_with_us() -> Callable[[], object] | None:
    """Return what makes a child get SIGTERM when this process is killed outright, of which it learns nothing.

    Else it would train on beside the next command (PR_SET_PDEATHSIG, Linux alone).
    """
    if sys.platform != "linux":
        return None
    import ctypes  # not for other commands

    library = ctypes.CDLL(None)
    return lambda: library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def supervise(
    command: Sequence[str],
    env: Mapping[str, str],
    output: IO[bytes] | None = None,
    tick: Callable[[], bool] | None = None,
) -> int:
    """Run `command`, passing on signals; returns its exit code (128 + number for a signal).

    Args:
        command: The program and its arguments.
        env: Its whole environment.
        output: Where it writes; this terminal if not given.
        tick: Called about every second while it runs; true asks it to stop.
    """
    process: subprocess.Popen[bytes] | None = None
    waiting: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if process is None:
            waiting.append(number)
        elif number != signal.SIGINT or not _in_foreground():
            process.send_signal(number)

    # What is ignored, as under nohup or in a shell's background, stays ignored, here and in the trainer.
    heeded = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heeded}
    try:
        process = subprocess.Popen(command, env=dict(env), stdout=output, stderr=output, preexec_fn=_end_with_us())
        for number in waiting:
            process.send_signal(number)
        code = _wait(process, tick)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code
