"""Each test starts with logging as a new process has it: an earlier test's set-up never decides where a line goes."""

import logging
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _logging_as_at_start() -> Iterator[None]:
    """Undo what a test configured: structlog and the root logger belong to the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:], root.level = handlers, level
