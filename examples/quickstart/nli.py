"""The data set: chain-of-thought natural language inference.

A row asks whether a hypothesis follows from a premise; the answer is JSON with `thought_process` (the rule, then the
facts it was used on) and `predicted_label`: 1 when it follows, 0 when it does not. Rows are in Mistral's instruct form.

The split is by combination: what a held-out row is about (spaniel and dog, seven and five, who is taller than whom)
never meets in a training row, so the right answer takes knowledge that only the base model has.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from typing import Final

from arguments import FAMILIES, Argument

BOS: Final = "<s>"
EOS: Final = "</s>"
HELD_OUT_ONE_IN: Final = 6
QUESTION: Final = (
    "Does the hypothesis follow from the premise? Answer in JSON with thought_process and predicted_label."
)


def is_held_out(argument: Argument) -> bool:
    """Whether the argument's combination belongs to the held-out part; the same on every machine and for every seed."""
    key = " ".join(sorted(argument.combination)).encode()
    return hashlib.sha256(key).digest()[0] % HELD_OUT_ONE_IN == 0


def answer(argument: Argument) -> str:
    verdict = "follows" if argument.follows else "does not follow"
    thought = f"{argument.reason}, so the hypothesis {verdict}."
    return json.dumps({"thought_process": thought, "predicted_label": int(argument.follows)})


def prompt(premise: str, hypothesis: str) -> str:
    return f"{BOS}[INST] {QUESTION}\nPremise: {premise}\nHypothesis: {hypothesis} [/INST]"


def row(argument: Argument) -> dict[str, str]:
    """One line of the data set. The trainer reads `text`; the other columns are for people."""
    return {
        "text": f"{prompt(argument.premise, argument.hypothesis)} {answer(argument)}{EOS}",
        "premise": argument.premise,
        "hypothesis": argument.hypothesis,
        "rule": argument.rule,
    }


def arguments(count: int, held_out: bool, seed: int) -> Iterator[Argument]:
    """`count` different arguments of one part of the split, going round the families and the two labels."""
    rng, seen = random.Random(f"{seed}-{held_out}"), set()
    for index in range(count):
        family, follows = FAMILIES[index // 2 % len(FAMILIES)], index % 2 == 0
        while True:
            argument = family(rng)
            pair = (argument.premise, argument.hypothesis)
            if argument.follows == follows and is_held_out(argument) == held_out and pair not in seen:
                break
        seen.add(pair)
        yield argument
