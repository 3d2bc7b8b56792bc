"""Arguments: a premise, a hypothesis, whether it follows, and the rule that says so.

Six families. Following and not following are equally frequent in each, and the sentences are drawn so that neither of
them alone gives the label away (Gururangan et al. 2018, arXiv:1803.02324).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from world import COLORS, KINDS, NAMES, NUMBERS, OPPOSITES, PLACES, Taxonomy, a, is_a

_OWNING: Final = ("has", "owns", "sees", "draws")
_BEING: Final = ("is", "lives", "works", "sleeps")
_COLORED: Final = ("scarf", "door", "bag", "cup", "chair", "kite", "lamp", "box")
_COUNTED: Final = ("apples", "coins", "books", "cards", "stamps", "pens", "plates", "keys")
#: What licenses a step upward, and downward under negation (natural logic; MacCartney & Manning 2007).
_LAWS: Final = {
    "kinds": ("A kind implies its class", "No class implies no kind"),
    "places": ("A part implies the whole", "Not the whole implies not the part"),
    "colors": ("A shade implies its color", "Not the color implies not the shade"),
}


@dataclass(frozen=True)
class Argument:
    """One inference. `law` licenses it, `fact` is what the law is used on; its outcome is matched with the claim.

    `combination` is what the inference is about: the unit of the held-out split.
    """

    premise: str
    hypothesis: str
    law: str
    fact: str
    match: str
    follows: bool
    rule: str
    combination: frozenset[str]

    @property
    def reason(self) -> str:
        return f"{self.law}: {self.fact}; {self.match}"


def matched(outcome: str, claim: str) -> str:
    """Whether what is found and what is claimed are the same word."""
    return f"{outcome} and {claim} {'agree' if outcome == claim else 'differ'}"


def _frame(rng: random.Random, taxonomy: Taxonomy) -> Callable[[str, bool], str]:
    """A way to say things about one person: (entry, denied) -> sentence."""
    name = rng.choice(NAMES)
    if taxonomy is KINDS:
        verb = rng.choice(_OWNING)
        return lambda entry, denied: f"{name} {verb} {'no ' + entry if denied else a(entry)}."
    if taxonomy is PLACES:
        verb = rng.choice(_BEING)
        negative = "is not" if verb == "is" else f"does not {verb.removesuffix('s')}"
        return lambda entry, denied: f"{name} {negative if denied else verb} in {entry}."
    thing = rng.choice(_COLORED)
    return lambda entry, denied: f"The {thing} of {name} is {'not ' if denied else ''}{entry}."


def classification(rng: random.Random, taxonomy: Taxonomy) -> Argument:
    """From a kind to its class; under negation from the class to its kinds; never the other way."""
    say, denied = _frame(rng, taxonomy), rng.random() < 0.5
    if rng.random() < 0.1 and taxonomy.middles:
        start = rng.choice(taxonomy.middles)
        target = rng.choice(taxonomy.below(start))
    else:
        start = rng.choice(list(taxonomy.parent))
        target = rng.choice(taxonomy.ancestors(start))
        if rng.random() < 0.5:
            target = rng.choice([entry for entry in taxonomy.level(taxonomy.depth(target)) if entry != target])
    path = taxonomy.climb(start, taxonomy.depth(target))
    premise, hypothesis = (target, start) if denied else (start, target)
    return Argument(
        premise=say(premise, denied),
        hypothesis=say(hypothesis, denied),
        law=_LAWS[taxonomy.name][denied],
        fact=" and ".join(is_a(taxonomy, low, high) for low, high in pairwise(path)),
        match=matched(path[-1], target),
        follows=path[-1] == target,
        rule=taxonomy.name + ("-denied" if denied else ""),
        combination=frozenset({start, target}),
    )


def conjunction(rng: random.Random) -> Argument:
    """Each part of a pair follows; nothing else does."""
    name, verb, follows = rng.choice(NAMES), rng.choice(_OWNING), rng.random() < 0.5
    top = rng.choice(KINDS.level(0))
    first, second, third = rng.sample([entry for entry in KINDS.below(top) if entry not in KINDS.middles], 3)
    asked = rng.choice((first, second)) if follows else third
    return Argument(
        premise=f"{name} {verb} {a(first)} and {a(second)}.",
        hypothesis=f"{name} {verb} {a(asked)}.",
        law="A pair implies each part",
        fact=f"{a(first)} and {a(second)}",
        match=", ".join(matched(one, asked) for one in ((first,) if asked == first else (first, second))),
        follows=follows,
        rule="conjunction",
        combination=frozenset({first, second, asked}),
    )


def compared(left: str, right: str) -> str:
    """'more' or 'fewer', for two different numbers."""
    return "more" if NUMBERS.index(left) > NUMBERS.index(right) else "fewer"


def quantity(rng: random.Random) -> Argument:
    """Two numbers compared: with a bound, or between two people."""
    (name, other), (left, right), thing = rng.sample(NAMES, 2), rng.sample(NUMBERS, 2), rng.choice(_COUNTED)
    claim, truth = rng.choice(("more", "fewer")), compared(left, right)
    if rng.random() < 0.5:
        premise, hypothesis = f"{name} has {left} {thing}.", f"{name} has {claim} than {right} {thing}."
    else:
        premise = f"{name} has {left} {thing} and {other} has {right}."
        hypothesis = f"{name} has {claim} {thing} than {other}."
    return Argument(
        premise=premise,
        hypothesis=hypothesis,
        law="Numbers compare",
        fact=f"{left} is {truth} than {right}",
        match=matched(truth, claim),
        follows=claim == truth,
        rule="quantity",
        combination=frozenset({left, right}),
    )


def order(rng: random.Random) -> Argument:
    """A comparison turned around, or two of them chained."""
    chained, follows = rng.random() < 0.5, rng.random() < 0.5
    people, word = rng.sample(NAMES, 3 if chained else 2), rng.choice(list(OPPOSITES))
    first, last = people[0], people[-1]
    subject, other, truth = (first, last, word) if chained else (last, first, OPPOSITES[word])
    claim = truth if follows else OPPOSITES[truth]
    steps = [f"{one} is {word} than {two}" for one, two in pairwise(people)]
    return Argument(
        premise=" and ".join(steps) + ".",
        hypothesis=f"{subject} is {claim} than {other}.",
        law="Comparisons chain" if chained else "A comparison turns around",
        fact=f"{subject} is {truth} than {other}",
        match=matched(truth, claim),
        follows=follows,
        rule="chain" if chained else "converse",
        combination=frozenset({*people, word, OPPOSITES[word]}),
    )


#: One function per family; each draws an argument.
FAMILIES: Final[tuple[Callable[[random.Random], Argument], ...]] = (
    lambda rng: classification(rng, KINDS),
    lambda rng: classification(rng, PLACES),
    lambda rng: classification(rng, COLORS),
    conjunction,
    quantity,
    order,
)


def draw(rng: random.Random) -> Argument:
    """An argument of any family."""
    return rng.choice(FAMILIES)(rng)
