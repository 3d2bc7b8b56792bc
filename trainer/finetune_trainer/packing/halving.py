"""Which trials of one process fall behind the others at a rung: successive halving in the sweep's order.

Where the GPU holds the adapters of all trials, all are compared with each other: one that comes to a rung gives its
place to the next and waits for the rest. Where it does not, the first ones, which start together, are compared with
each other, and a later one with all before it in the sweep's order. So it does not matter who is faster, and however
often the process is killed, the same trials stop.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from finetune_api.spec_pack import Halving


@dataclass(frozen=True)
class AtRung:
    """A trial that asks whether it goes on.

    Attributes:
        step: The rung.
        value: Its evalLoss there.
    """

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
        running: The trials that may still come to a rung, begun or not.
        together: How many of the first trials are compared with each other.
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
