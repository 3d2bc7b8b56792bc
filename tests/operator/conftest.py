"""Fixtures of the operator's tests."""

from support.operator.fixtures import (
    jobs,
    node,
    operator,
    own_operator,
    start_operator,
)

__all__ = ["jobs", "node", "operator", "own_operator", "start_operator"]
