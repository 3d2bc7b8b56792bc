"""The trainer in this process: its errors as the command line tells them, and its log off the screen."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api import constants
from finetune_cli.errors import CliError, install_hint
from finetune_cli.published import Published, fetch_into, require_unchanged
from finetune_cli.storage import cache_folder, cli_error, told_on_screen

if TYPE_CHECKING:
    from finetune_trainer.settings import Settings

EXTRA = install_hint("trainer")
#: Packages that compute; the command line alone comes without them.
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class LocalAdapter:
    """A published adapter in a folder of this machine, and its job as it runs here."""

    folder: Path
    settings: Settings


def require_trainer(doing: str) -> None:
    """Raise CliError if what computes is not installed."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise CliError(
            f"{doing} needs the trainer, which is not installed here ({', '.join(missing)} missing)", hint=EXTRA
        )


def published_adapter(published: Published, work: Path, base: str | None, changes: Sequence[str] = ()) -> LocalAdapter:
    """Fetch and verify an adapter into the cache, and return it with its job, changed so that it runs here.

    Args:
        published: The adapter.
        work: A folder of this process.
        base: Folder or URI of the base model; None takes the job's.
        changes: Further changes of the job, as --set takes them.
    """
    from finetune_trainer.model.published import gpu_here, job_of
    from finetune_trainer.settings import Environment, Ranks, Settings

    require_unchanged(published)
    folder = cache_folder(os.environ) / "adapters" / published.digest
    fetch_into(folder, published)
    changes = ["resources.nodes=1", f"resources.gpusPerNode={int(gpu_here())}", *changes]
    if base is not None:
        changes.append(f"model.source={base if '://' in base else f'file://{Path(base).resolve()}'}")
    job = job_of(folder, changes)
    if job.spec.model.source.startswith("pvc://") and constants.ENV_PVC_ROOT not in os.environ:
        raise CliError(
            f"the base model of this adapter is {job.spec.model.source}, a volume of a cluster",
            hint="copy it here and add --base DIR",
        )
    env = {constants.ENV_CACHE_DIR: str(cache_folder(os.environ)), constants.ENV_SCRATCH_DIR: str(work)}
    return LocalAdapter(folder, Settings(job, Environment.from_env(env | os.environ), Ranks()))


@contextmanager
def base_model_errors() -> Iterator[None]:
    """Say of a base model that cannot be fetched what to do."""
    from finetune_trainer.stores.errors import StoreError

    try:
        yield
    except StoreError as error:
        raise CliError(
            f"the base model of this adapter cannot be fetched: {error}",
            hint="--base takes it from another folder or URI",
            code=cli_error(error).code,
        ) from None


@contextmanager
def explained() -> Iterator[None]:
    """Turn what the trainer says into CliError."""
    try:
        from finetune_trainer.errors import TrainerError
    except ModuleNotFoundError as error:
        raise CliError(f"{error.name} is not installed here", hint=EXTRA) from None
    try:
        with told_on_screen():
            yield
    except ModuleNotFoundError as error:
        raise CliError(f"{error.name} is not installed here", hint=EXTRA) from None
    except TrainerError as error:
        raise cli_error(error) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the trainer's log, and libraries' warnings, off the screen: the page says what it says."""
    import logging
    import warnings

    import structlog

    before, disabled = structlog.get_config(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        structlog.configure(**before)
