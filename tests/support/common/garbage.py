"""The garbage collector waits until all is imported, passes over that, and looks seldom for the rest.

It would walk the half million objects of torch and transformers again and again: a tenth of the tests' work.
"""

import gc
from collections.abc import Generator

import pytest

gc.disable()

#: Python's own begin with 700: a test that reads a chart or a schema makes a hundred times as many objects.
_THRESHOLDS = (50_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    try:
        return (yield)  # imports every test's file, and so almost everything
    finally:
        gc.freeze()
        gc.set_threshold(*_THRESHOLDS)
        gc.enable()
