"""Which trials of one process fall behind the others at a rung: successive halving in the sweep's order.

A trial is compared with all before it in that order; the first ones, which start together, with each other. It waits
at the rung for those that have not come there. So it does not matter who is faster, and however often the process is
killed, the same trials stop. Nothing is waited for long: those before it have started before it.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetune_api import constants
from finetune_api.spec_pack import Halving
from finetune_trainer.checkpoints.folder import RunDirectory


@dataclass(frozen=True)
class AtRung:
    """A trial that asks whether it goes on.

    Attributes:
        place: Its place.
        step: The rung.
        value: Its evalLoss there.
    """

    place: int
    step: int
    value: float


def decide(
    asking: Mapping[int, AtRung],
    known: Sequence[Mapping[int, float]],
    running: Collection[int],
    together: int,
    halving: Halving,
) -> dict[int, str]:
    """Return why trials stop, empty for those that go on; those that are still to wait are left out.

    Args:
        asking: Those at a rung, by their number in the sweep's order.
        known: The evalLoss of every trial, by step: of those that ask, too.
        running: The trials that may still come to a rung.
        together: How many trials start at the same time.
        halving: What the sweep asks for.
    """
    found = {}
    for number, each in asking.items():
        compared = range(max(number + 1, min(together, len(known))))
        if any(other in running and all(step < each.step for step in known[other]) for other in compared):
            continue
        passed = [known[other][each.step] for other in compared if each.step in known[other]]
        better = sum(value < each.value for value in passed)
        found[number] = (
            f"Stopped after step {each.step}: evalLoss {each.value:.4g}, and {better} of {len(passed)} trials were"
            " better there"
            if halving.is_behind(each.value, passed)
            else ""
        )
    return found


def eval_losses(directory: RunDirectory) -> dict[int, float]:
    """Return the evalLoss by step of a run: as far as this process has it, or as an earlier one published it."""
    for file in (directory.metrics_file, directory.published / constants.METRICS_FILE):
        if file.exists():
            return dict(_evaluations(file))
    return {}


def _evaluations(file: Path) -> Iterator[tuple[int, float]]:
    for line in file.read_bytes().splitlines():
        with suppress(ValueError, RecursionError):  # a store's file may hold anything
            found = json.loads(line)
            step, loss = (found.get(key) if isinstance(found, dict) else None for key in ("step", "evalLoss"))
            if isinstance(step, int) and isinstance(loss, int | float) and math.isfinite(loss):
                yield step, loss
