"""What is true in the quickstart's little world: which kind is of which, what lies where, what counts more.

Three taxonomies, the numbers from two to ten, and pairs of opposite comparatives. Everything the data set asks
follows from these tables, so every label can be checked.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Final


def words(text: str) -> list[str]:
    """The words of a table."""
    return text.split()


NAMES: Final = words("Ada Ben Cora Dan Eva Finn Gina Hugo Ines Jon Kira Leo Mara Nils Olga Paul Rosa Sven Tara Yuri")

NUMBERS: Final = words("two three four five six seven eight nine ten")

#: Each comparative with its opposite.
OPPOSITES: Final = {
    "taller": "shorter",
    "older": "younger",
    "faster": "slower",
    "richer": "poorer",
    "stronger": "weaker",
}
OPPOSITES.update({low: high for high, low in list(OPPOSITES.items())})

_KINDS: Final = {
    "animal": {
        "dog": "spaniel poodle beagle terrier collie",
        "bird": "robin sparrow heron finch magpie",
        "fish": "trout salmon carp herring tuna",
    },
    "plant": {"tree": "oak birch willow maple cedar", "flower": "rose tulip daisy lily orchid"},
    "garment": {"hat": "beret bonnet fedora turban cap", "shoe": "sandal boot slipper loafer clog"},
    "vehicle": {"boat": "canoe kayak yacht ferry barge", "car": "sedan taxi limousine hatchback jeep"},
}
_PLACES: Final = {
    "Europe": {
        "France": "Paris Lyon Lille Nantes",
        "Spain": "Madrid Seville Bilbao Malaga",
        "Italy": "Rome Milan Turin Naples",
    },
    "Asia": {"Japan": "Tokyo Osaka Kyoto Nagoya", "India": "Delhi Mumbai Chennai Pune"},
    "Africa": {"Kenya": "Nairobi Mombasa Kisumu Nakuru", "Egypt": "Cairo Luxor Aswan Giza"},
}
_COLORS: Final = {
    "": {
        "red": "crimson scarlet ruby cherry",
        "blue": "navy azure cobalt indigo",
        "green": "emerald olive lime mint",
        "yellow": "lemon amber mustard saffron",
        "brown": "chestnut walnut coffee cocoa",
    }
}


class Taxonomy:
    """A forest, given as each entry's parent. Names are unique over all taxonomies."""

    def __init__(self, name: str, parent: dict[str, str]) -> None:
        self.name = name
        self.parent = parent
        self.entries = list(dict.fromkeys([*parent, *parent.values()]))
        self._above = {entry: list(self._climb(entry)) for entry in self.entries}

    def _climb(self, entry: str) -> Iterator[str]:
        while entry in self.parent:
            entry = self.parent[entry]
            yield entry

    def ancestors(self, entry: str) -> list[str]:
        """Everything above `entry`, nearest first."""
        return self._above[entry]

    def below(self, entry: str) -> list[str]:
        """Everything below `entry`."""
        return [other for other, above in self._above.items() if entry in above]

    def depth(self, entry: str) -> int:
        """0 for the top level."""
        return len(self._above[entry])

    def level(self, depth: int) -> list[str]:
        """Every entry of one depth."""
        return [entry for entry, above in self._above.items() if len(above) == depth]

    @cached_property
    def middles(self) -> list[str]:
        """Entries with something above and something below."""
        return [entry for entry in self.parent if self.below(entry)]

    def climb(self, entry: str, depth: int) -> list[str]:
        """The path from `entry` up to `depth`, one step at least."""
        above = self._above[entry]
        return [entry, *above[: max(1, len(above) - depth)]]


def _taxonomy(name: str, table: dict[str, dict[str, str]]) -> Taxonomy:
    parent = {leaf: middle for groups in table.values() for middle, leaves in groups.items() for leaf in words(leaves)}
    parent |= {middle: top for top, groups in table.items() for middle in groups if top}
    return Taxonomy(name, parent)


KINDS: Final = _taxonomy("kinds", _KINDS)
PLACES: Final = _taxonomy("places", _PLACES)
COLORS: Final = _taxonomy("colors", _COLORS)
TAXONOMIES: Final = (KINDS, PLACES, COLORS)


def a(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def is_a(taxonomy: Taxonomy, low: str, high: str) -> str:
    """The bare fact that `low` is below `high`, as a clause in lower case."""
    if taxonomy is KINDS:
        return f"{a(low)} is {a(high)}"
    return f"{low} is in {high}" if taxonomy is PLACES else f"{low} is a shade of {high}"
