"""Copies of objects as an API server hands them out: its own, and nobody else's."""

import pickle
from typing import Any


def copied(obj: Any) -> Any:
    """A copy of an object of the API, several times as fast as copy.deepcopy."""
    return pickle.loads(pickle.dumps(obj, pickle.HIGHEST_PROTOCOL))
