"""Capture what is launched as a CUDA graph, and come back from captures that fail."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


def capture(function: Callable[[], None], pool: Any = None) -> tuple[Any, Any]:
    """Capture what `function` launches; return the graph, and the pool of its memory.

    Where it raises, call `leave_capture` once what was captured before is dropped.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:  # other threads may do as they like meanwhile: they pin memory, and watch over messages of several ranks
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
    finally:
        torch.cuda.set_stream(stream)  # torch leaves its own in place when it cannot end a capture
    return graph, graph.pool()


def leave_capture() -> None:
    """Let the random generators leave a capture that CUDA ended: else they refuse to draw from then on."""
    if not torch.cuda.is_initialized():
        return
    stream = torch.cuda.current_stream()
    with suppress(Exception):
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros((), device="cuda")
    torch.cuda.set_stream(stream)
