"""Rules of the folder tree that break Python itself when broken."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["operator", "tests/operator", "tests"])
def test_no_package_shadows_the_standard_library(folder: str):
    assert not (ROOT / folder / "__init__.py").exists()
