"""The run's scratch directory."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_api import constants
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.settings import Settings


@contextmanager
def work_folder(settings: Settings) -> Iterator[Path]:
    """Make an empty folder in the scratch directory, and remove it afterwards.

    Raises:
        ConfigInvalid: When the scratch directory cannot be written.
    """
    scratch = settings.environment.scratch
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{settings.job_name}-", dir=scratch))
    except OSError as error:
        raise ConfigInvalid(f"{constants.ENV_SCRATCH_DIR}: {scratch} cannot be written: {error.strerror}") from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
