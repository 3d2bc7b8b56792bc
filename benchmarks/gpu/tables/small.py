"""Passes too short for Python: few rows of a large model, and small models. Kernels launched, and as CUDA graphs.

One process trains at all settings in turn (in_turn.py). A word after `small` names the shape to build where the model
is missing; a second one, `TRL`, measures TRL's loop besides.
"""

import sys
from pathlib import Path
from typing import Any

from runs import HERE, MODEL, build, in_turn, reference

#: Rows of a step: of a large model the fewest, of a small one those of the recipe.
ROWS = {"mistral-7b": (1, 2, 4, 8), "llama-3-8b": (1, 2, 4, 8)}
STEPS = 120


def small(folder: Path) -> None:
    shape, *others = sys.argv[3:] or ["mistral-7b"]
    build(shape)
    rows = ROWS.get(shape, (16,))
    in_turn(folder, HERE / "in_turn.py", [setting(each, switch) for each in rows for switch in ("disabled", "enabled")])
    if "TRL" in others:
        for each in rows:
            reference({"bs": each, "ga": 1, "gc": False})


def setting(rows: int, switch: str) -> dict[str, Any]:
    """Return a setting of so many rows a step, with CUDA graphs or without; steps without take longer."""
    steps = STEPS if switch == "enabled" else STEPS // 2
    return {
        "setting": f"{MODEL.name}, {rows} rows, CUDA graphs {switch}",
        "training": {"batch_size": rows, "cuda_graphs": switch, "max_steps": steps, "scheduler": "constant"},
    }
