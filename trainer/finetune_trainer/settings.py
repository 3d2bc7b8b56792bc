"""Where a trainer process finds its things: the manifest, and folders and addresses from the environment."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api import constants
from finetune_api.manifest import load_file
from finetune_api.spec import FineTuneJob, FineTuneJobSpec


@dataclass(frozen=True)
class Environment:
    """What the process's environment says; every default is the pod's (finetune_api.constants)."""

    scratch: Path
    cache: Path | None
    secrets: Path
    pvc_root: Path
    termination_log: Path
    listen: str
    attempt: int
    node: str
    """The pod's node; '' outside a pod of the operator."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Environment":
        cache = env.get(constants.ENV_CACHE_DIR)
        attempt = env.get(constants.ENV_ATTEMPT, "1")
        return cls(
            scratch=Path(env.get(constants.ENV_SCRATCH_DIR, constants.SCRATCH_DIR)),
            cache=Path(cache) if cache else None,
            secrets=Path(env.get(constants.ENV_SECRETS_DIR, constants.SECRETS_DIR)),
            pvc_root=Path(env.get(constants.ENV_PVC_ROOT, constants.PVC_ROOT)),
            termination_log=Path(env.get(constants.ENV_TERMINATION_LOG, constants.TERMINATION_LOG)),
            listen=env.get(constants.ENV_LISTEN, f"0.0.0.0:{constants.TRAINER_PORT}"),
            attempt=int(attempt) if attempt.isdigit() else 1,
            node=env.get(constants.ENV_NODE, ""),
        )

    @property
    def model_cache(self) -> Path:
        """Where models and data sets are kept: shared by jobs, or this run's own."""
        return self.cache or self.scratch / "cache"

    @property
    def compile_cache(self) -> Path:
        """Where compiled kernels are kept."""
        return self.model_cache / "compiled"


@dataclass(frozen=True)
class Ranks:
    """This process among the job's processes (torchrun's environment variables); one process per GPU."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Ranks":
        return cls(int(env.get("RANK", "0")), int(env.get("LOCAL_RANK", "0")), int(env.get("WORLD_SIZE", "1")))

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Settings:
    """All that one run depends on.

    Attributes:
        job: The manifest.
        environment: Where things lie.
        ranks: This process among the job's.
        warm_up: Whether to fill the cache with what the job needs, and train nothing.
    """

    job: FineTuneJob
    environment: Environment
    ranks: Ranks
    warm_up: bool = False

    @property
    def spec(self) -> FineTuneJobSpec:
        return self.job.spec

    @property
    def job_name(self) -> str:
        name: str = self.job.metadata.name
        return name


def load(
    path: Path, overrides: Sequence[str], environment: Environment, ranks: Ranks, warm_up: bool = False
) -> Settings:
    """Read the manifest at `path`, `overrides` on top. Raises ManifestError."""
    return Settings(load_file(path, list(overrides)), environment, ranks, warm_up)


def resolved_job(job: FineTuneJob) -> dict[str, Any]:
    """Return the manifest with every default filled in; of the metadata only what names the job."""
    manifest = job.manifest()
    named = {key: value for key, value in manifest["metadata"].items() if key in ("name", "namespace", "uid")}
    return {
        "apiVersion": manifest["apiVersion"],
        "kind": manifest["kind"],
        "metadata": named,
        "spec": manifest["spec"],
    }
