"""The few shapes that packed micro-batches are filled up to, to be captured once each. Importable without torch."""

from typing import Final

#: Products are computed in tiles of so many tokens anyway.
_LEAST: Final = 64
#: Of two powers of two that enclose a number, the larger has so many steps: at most a 32nd of all tokens is padding.
_STEPS: Final = 64
#: Targets are filled up to so many equal parts of the tokens: each pair of shapes is captured by itself.
_PARTS: Final = 8


def step_of(count: int) -> int:
    """Return the distance between the shapes near `count`, a power of two."""
    return max(_LEAST, (1 << count.bit_length()) // _STEPS)


def filled_up(count: int) -> int:
    """Return the shape for `count` tokens: the next multiple of the distance, and at least one of it."""
    step = step_of(count)
    return max(1, -(-count // step)) * step


def filled_up_targets(count: int, tokens: int) -> int:
    """Return the shape for `count` targets among `tokens`, a shape of tokens."""
    part = tokens // _PARTS
    return max(1, -(-count // part)) * part
