"""What became of the conditions in publish.onlyIf, and where an adapter is kept that did not meet them."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_api import constants
from finetune_api.base import ApiModel, FiniteOrNone
from finetune_api.uri import MAX_LENGTH as MAX_URI_LENGTH

MAX_CHECKS = 8
_WORDS = {"atLeast": "at least", "atMost": "at most", "betterThan": "better than"}


class GateCheck(ApiModel):
    """One condition of publish.onlyIf, and the numbers that decided it."""

    model_config = ConfigDict(extra="ignore", strict=False)

    metric: Annotated[str, Field(max_length=32)]
    """What was measured on the held-out rows."""
    value: FiniteOrNone = None
    """This run's value; absent if it has none."""
    comparison: Literal["atLeast", "atMost", "betterThan"]
    """How the two are compared."""
    bar: FiniteOrNone = None
    """What it is compared with; absent if that could not be had."""
    other: Annotated[str, Field(max_length=MAX_URI_LENGTH)] | None = None
    """With betterThan, where the other adapter lies."""
    other_digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    """With betterThan, sha256:<hex> of its manifest.json."""
    passed: bool
    """Whether the condition is met."""
    problem: Annotated[str, Field(max_length=512)] | None = None
    """Why the two could not be compared."""

    @property
    def told(self) -> str:
        """Both numbers, as 'f1 0.8712, at least 0.9 is asked'."""
        mine = "not measured" if self.value is None else f"{self.value:.5g}"
        asked = "" if self.bar is None else f" {self.bar:.5g}"
        whose = f" ({self.other})" if self.other else ""
        why = f": {self.problem}" if self.problem else ""
        return f"{self.metric} {mine}, {_WORDS[self.comparison]}{asked} is asked{whose}{why}"


def candidate_folder(name: str, uid: str | None) -> str:
    """Return the folder below output.uri that keeps the adapter of a job that did not pass its gate."""
    mark = "".join(character for character in uid or "" if character.isascii() and character.isalnum())[:8]
    return f"{constants.CANDIDATES_DIR}/{name}-{mark}" if mark else f"{constants.CANDIDATES_DIR}/{name}"


def candidate_uri(output: str, name: str, uid: str | None) -> str:
    """Return the URI of that folder."""
    return f"{output.rstrip('/')}/{candidate_folder(name, uid)}"
