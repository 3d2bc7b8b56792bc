"""Garbage collection: exclude what is imported once and stays."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def freeze_imports() -> Iterator[None]:
    """Exclude everything imported in this block from garbage collection (gc.freeze).

    The collector would walk half a million objects of torch and transformers again and again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
