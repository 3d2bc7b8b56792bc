"""Fixtures of the tests that need a GPU."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, and rows of about 500 tokens."""
    from support.trainer.gpu import make_material

    return make_material(tmp_path_factory.mktemp("material"))
