"""Garbage collection: exclude what is imported once and stays."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def freeze_imports() -> Iterator[None]:
    """Import within it what stays to the end: the garbage collector, which would go through all of it again and again
    (half a million objects of torch and transformers), passes over it for ever."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
