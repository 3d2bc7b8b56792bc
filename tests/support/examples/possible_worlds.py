"""Entailment by brute force: a hypothesis follows when it is true in every possible world in which the premise is.

A second opinion on the quickstart's labels. It reads the English sentences and knows nothing of the rules that made
them; only who is what, and what lies where, is taken from the tables.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, permutations, product
from typing import Any

UPWARD = {"taller": "shorter", "older": "younger", "faster": "slower", "richer": "poorer", "stronger": "weaker"}
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
World = Any
Claim = Callable[[World], bool]


@dataclass(frozen=True)
class Taxonomies:
    """Each entry's parent."""

    kinds: dict[str, str]
    places: dict[str, str]
    colors: dict[str, str]


def members(parent: dict[str, str], entry: str) -> set[str]:
    """The lowest entries at or below `entry`."""
    children = [low for low, high in parent.items() if high == entry]
    return set().union(*(members(parent, child) for child in children)) if children else {entry}


def leaves(parent: dict[str, str]) -> list[str]:
    return sorted(set(parent) - set(parent.values()))


def follows(premise: str, hypothesis: str, tables: Taxonomies) -> bool:
    """Whether `premise` entails `hypothesis`. Raises ValueError for a sentence that is not understood, or a premise
    that cannot be true."""
    given, claimed = list(_read(premise, tables)), list(_read(hypothesis, tables))
    topics = {topic for topic, _ in given + claimed}
    if len(topics) != 1:
        raise ValueError(f"these are not about one thing: {premise} {hypothesis}")
    people = sorted(set(re.findall(r"\b[A-Z][a-z]+\b", premise + hypothesis)) - {"The"})
    worlds = [world for world in _worlds(topics.pop(), people, tables) if all(claim(world) for _, claim in given)]
    if not worlds:
        raise ValueError(f"no world is like this: {premise}")
    return all(claim(world) for world in worlds for _, claim in claimed)


def _worlds(topic: str, people: list[str], tables: Taxonomies) -> Iterable[World]:
    family = topic.split()[0]
    if family == "things":  # what one person has (or sees, or draws): up to two kinds
        everything = leaves(tables.kinds)
        return (set(some) for size in range(3) for some in combinations(everything, size))
    if family == "place":
        return [*leaves(tables.places), "nowhere"]
    if family == "color":
        return [*leaves(tables.colors), "no color"]
    if family == "count":
        return (dict(zip(people, numbers, strict=True)) for numbers in product(range(13), repeat=len(people)))
    return (dict(zip(people, ranks, strict=True)) for ranks in permutations(range(len(people))))


def _read(sentence: str, tables: Taxonomies) -> Iterator[tuple[str, Claim]]:
    """The claims of a sentence, each with its topic."""
    text = sentence.removesuffix(".")
    for pattern, reader in _READERS:
        if match := re.fullmatch(pattern, text):
            yield from reader(match.groupdict(), tables)
            return
    raise ValueError(f"not understood: {sentence}")


def _things(found: dict[str, str], tables: Taxonomies) -> Iterator[tuple[str, Claim]]:
    topic = f"things {found['name']} {found['verb']}"
    for thing in filter(None, (found["one"], found.get("two"))):
        kind = members(tables.kinds, thing)
        yield topic, lambda world, kind=kind: bool(world & kind)


def _nothing(found: dict[str, str], tables: Taxonomies) -> Iterator[tuple[str, Claim]]:
    kind = members(tables.kinds, found["one"])
    yield f"things {found['name']} {found['verb']}", lambda world: not world & kind


def _place(found: dict[str, str], tables: Taxonomies) -> Iterator[tuple[str, Claim]]:
    inside, denied = members(tables.places, found["place"]), bool(found["not"])
    verb = found["verb"].removesuffix("s") if found["verb"] != "is" else "is"
    yield f"place {found['name']} {verb}", lambda world: (world in inside) != denied


def _color(found: dict[str, str], tables: Taxonomies) -> Iterator[tuple[str, Claim]]:
    shades, denied = members(tables.colors, found["color"]), bool(found["not"])
    yield f"color {found['thing']} {found['name']}", lambda world: (world in shades) != denied


def _counts(found: dict[str, str], tables: Taxonomies) -> Iterator[tuple[str, Claim]]:
    yield f"count {found['thing']}", lambda world: world[found["name"]] == COUNTS[found["number"]]
    if found.get("other"):
        yield f"count {found['thing']}", lambda world: world[found["other"]] == COUNTS[found["second"]]


def _bound(found: dict[str, str], tables: Taxonomies) -> Iterator[tuple[str, Claim]]:
    name, more = found["name"], found["word"] == "more"

    def claim(world: World) -> bool:
        other = world[found["other"]] if found.get("other") else COUNTS[found["number"]]
        return bool(world[name] > other if more else world[name] < other)

    yield f"count {found['thing']}", claim


def _order(found: dict[str, str], tables: Taxonomies) -> Iterator[tuple[str, Claim]]:
    pairs = [(found["a"], found["word"], found["b"])]
    if found.get("c"):
        pairs.append((found["c"], found["word2"], found["d"]))
    for one, word, two in pairs:
        up = word in UPWARD
        dimension = word if up else next(high for high, low in UPWARD.items() if low == word)
        yield (
            f"order {dimension}",
            lambda world, one=one, two=two, up=up: (world[one] > world[two]) == up,
        )


_NAME = r"(?P<name>[A-Z]\w+)"
_READERS = (
    (rf"{_NAME} (?P<verb>has|owns|sees|draws) an? (?P<one>\w+)( and an? (?P<two>\w+))?", _things),
    (rf"{_NAME} (?P<verb>has|owns|sees|draws) no (?P<one>\w+)", _nothing),
    (rf"{_NAME} (?P<not>does not )?(?P<verb>lives?|works?|sleeps?) in (?P<place>\w+)", _place),
    (rf"{_NAME} (?P<verb>is) (?P<not>not )?in (?P<place>\w+)", _place),
    (rf"The (?P<thing>\w+) of {_NAME} is (?P<not>not )?(?P<color>\w+)", _color),
    (rf"{_NAME} has (?P<word>more|fewer) than (?P<number>\w+) (?P<thing>\w+)", _bound),
    (rf"{_NAME} has (?P<word>more|fewer) (?P<thing>\w+) than (?P<other>\w+)", _bound),
    (rf"{_NAME} has (?P<number>\w+) (?P<thing>\w+)( and (?P<other>\w+) has (?P<second>\w+))?", _counts),
    (
        r"(?P<a>\w+) is (?P<word>\w+) than (?P<b>\w+)( and (?P<c>\w+) is (?P<word2>\w+) than (?P<d>\w+))?",
        _order,
    ),
)
