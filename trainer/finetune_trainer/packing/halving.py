"""Which trials of one process fall behind the others at a rung: successive halving in the sweep's order.

A trial is compared with all before it in that order; the first ones, which start together, with each other. It waits
at the rung for those that have not come there. So it does not matter who is faster, and however often the process is
killed, the same trials stop. Nothing is waited for long: those before it have started before it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from finetune_api.spec_pack import Halving


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
