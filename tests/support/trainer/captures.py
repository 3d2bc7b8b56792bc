"""CUDA graphs where there is no GPU: a replay runs again what was captured, on the same tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune_trainer.engine import graphs


class Graph:
    """As torch.cuda.CUDAGraph: knows tensors, not arguments."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.replay = function


def replay_by_running_again(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let what captures do so; return the pool of each capture so far, a list that grows."""
    pools: list[Any] = []

    def capture(function: Callable[[], None], pool: Any) -> tuple[Graph, str]:
        pools.append(pool)
        with torch.random.fork_rng():
            function()  # as a real one, which computes and draws nothing yet
        return Graph(function), "pool"

    monkeypatch.setattr(graphs, "capture", capture)
    return pools
