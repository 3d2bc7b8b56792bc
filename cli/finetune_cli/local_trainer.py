"""The trainer in this process: its errors as the command line tells them, and its log off the screen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from finetune_cli.errors import CliError

EXTRA = "pip install 'finetune-operator[trainer]'"


@contextmanager
def explained() -> Iterator[None]:
    """Turn what the trainer says into CliError."""
    try:
        from finetune_trainer.errors import TrainerError
    except ModuleNotFoundError as error:
        raise CliError(f"{error.name} is not installed here", hint=EXTRA) from None
    from finetune_cli.storage import cli_error

    try:
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

    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        structlog.configure(**before)
