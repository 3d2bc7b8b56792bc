"""Set what libraries read from the environment as they are imported, unless the user has set it."""

import hashlib
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger(__name__)

_ALWAYS: Final = {
    # On shared cores, threads that wait must not spin: it starves those that work (10x on two busy cores).
    "OMP_WAIT_POLICY": "PASSIVE",
    # Micro-batches have any number of tokens: memory that one has left must serve the next.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # Rows are tokenized in threads, and no process is forked that would tokenize: that could wait forever.
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Credentials come from Secrets, the environment or workload identity (AWS_ROLE_ARN, AWS_CONTAINER_CREDENTIALS_*):
    # never from the node, which serves all tenants.
    "AWS_EC2_METADATA_DISABLED": "true",
}
#: A profile can name a program to run (credential_process): only one that the user asks for is read.
_AWS_FILES: Final = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
_AWS_PROFILES: Final = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")
#: Rooms whose source decides what is compiled.
_COMPILED: Final = tuple(Path(__file__).parents[1] / room for room in ("engine", "model"))


def set_defaults(scratch: Path, env: MutableMapping[str, str] = os.environ) -> None:
    """Call it before any library is imported that computes, downloads or signs.

    Args:
        scratch: Where caches go if the home directory cannot be written, as in a pod: what is downloaded never lies
            below it, for programs take configuration from there.
        env: Default: the process's environment.
    """
    defaults = dict(_ALWAYS)
    if not any(env.get(profile) for profile in _AWS_PROFILES):
        defaults |= dict.fromkeys(_AWS_FILES, os.devnull)
    home = env.get("HOME")
    if not home or not os.access(home, os.W_OK):
        caches = scratch / ".cache"
        defaults |= {
            "XDG_CACHE_HOME": str(caches),
            "MPLCONFIGDIR": str(caches / "matplotlib"),
            "WANDB_CONFIG_DIR": str(caches / "wandb"),
            "WANDB_DATA_DIR": str(caches / "wandb"),
            "CUDA_CACHE_PATH": str(caches / "cuda"),
        }
    for name, value in defaults.items():
        env.setdefault(name, value)


def set_compile_cache(folder: Path, env: MutableMapping[str, str] = os.environ) -> None:
    """Set Inductor and Triton cache directories so later runs reuse kernels. torch settles on one as it is imported.

    They reuse them with the same version of engine and model only: torch caches how gradients of our own operations
    are computed, and does not see when that changes.

    Args:
        folder: The same one for all runs that share their kernels.
        env: Default: the process's environment.
    """
    sources = b"".join(path.read_bytes() for room in _COMPILED for path in sorted(room.rglob("*.py")))
    folder = folder / hashlib.sha256(sources).hexdigest()[:12]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
    except OSError as error:
        problem = error.strerror
    if problem:  # torch cannot even be imported with a directory that it cannot make
        log.warning(f"Compiled kernels are not kept for later runs: {folder} cannot be written: {problem}")
        return
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    env.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
