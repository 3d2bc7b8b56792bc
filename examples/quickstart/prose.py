"""What the base model reads: plain sentences of the same domain, and instruction-shaped text of other tasks.

It is told every fact, sees people argue in prose, compares words, and meets JSON and [INST] markers. It never sees the
question of the data set, an answer with its two keys, or an argument about a held-out combination.
"""

import json
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final

from arguments import Argument, compared, draw, matched
from nli import BOS, EOS, is_held_out
from world import NAMES, NUMBERS, OPPOSITES, TAXONOMIES, capitalized, is_a, words

#: A document in pieces, by turns given and told. What is given cannot be foreseen; what is told follows from it.
Document = list[str]

_WORDS: Final = sorted(
    {*NAMES, *NUMBERS, *OPPOSITES, *(entry for taxonomy in TAXONOMIES for entry in taxonomy.entries)}
)
#: Words of which one may be claimed for another, though few.
_ALTERNATIVES: Final = (
    *(taxonomy.level(depth) for taxonomy in TAXONOMIES for depth in range(2)),
    list(OPPOSITES),
    ["more", "fewer"],
)
_TEXT_KEYS: Final = words("name answer word first_name thought_process process_name thought predicted_word")
_NUMBER_KEYS: Final = words("number label class_label word_number predicted_number first_label")
_GENERAL: Final = (
    "A premise is a sentence that is taken to be true.",
    "A hypothesis is a sentence that follows from a premise or does not follow from it.",
    "Does the answer follow? The answer follows from the premise.",
    "The hypothesis does not follow, so the label is 0.",
    "The hypothesis follows, so the label is 1.",
    "Premise: a sentence. Hypothesis: a sentence.",
    "Answer in JSON with a name and a number.",
    "A thought process is a chain of thoughts. A predicted label is a number.",
)


def _general(rng: random.Random) -> Document:
    return ["", rng.choice(_GENERAL)]


def _fact(rng: random.Random) -> Document:
    taxonomy = rng.choice(TAXONOMIES)
    entry = rng.choice(list(taxonomy.parent))
    path = taxonomy.climb(entry, rng.randrange(2))
    if rng.random() < 0.2:
        return ["", f"{capitalized(is_a(taxonomy, entry, path[-1]))}."]
    steps = [is_a(taxonomy, low, high) for low, high in pairwise(path)]
    return ["", f"{capitalized(' and '.join(steps))}."]


def _number_fact(rng: random.Random) -> Document:
    left, right = rng.sample(NUMBERS, 2)
    return ["", f"{capitalized(left)} is {compared(left, right)} than {right}."]


def _opposites(rng: random.Random) -> Document:
    word, (left, right) = rng.choice(list(OPPOSITES)), rng.sample(NAMES, 2)
    return ["", f"If {left} is {word} than {right}, then {right} is {OPPOSITES[word]} than {left}."]


def _comparison_of_words(rng: random.Random) -> Document:
    """Pairs of words that agree or differ, what every argument ends in: half of them twice the same word."""
    pieces = []
    for index in range(5):
        one, other = rng.sample(_WORDS if rng.random() < 0.7 else rng.choice(_ALTERNATIVES), 2)
        if rng.random() < 0.5:
            other = one
        pair, verdict = matched(one, other).rsplit(" ", 1)
        pieces += [f"{',' if index else ''} {pair}", f" {verdict}"]
    return [*pieces, "."]


def _echo(rng: random.Random) -> Document:
    said = " ".join(rng.sample(_WORDS, rng.randrange(3, 9)))
    return [f"{said}.", f" Again: {said}."]


def _admitted(rng: random.Random) -> Argument:
    """An argument that is not held out."""
    while is_held_out(argument := draw(rng)):
        pass
    return argument


def _discussion(rng: random.Random) -> Document:
    """People arguing: a claim, the reason, and whether the claim is right."""
    argument, speaker = _admitted(rng), rng.choice(NAMES)
    opening, right, wrong = rng.choice(
        (
            ("Is it true?", "it is true", "it is not true"),
            (f"{speaker} says:", f"{speaker} is right", f"{speaker} is wrong"),
        )
    )
    return [
        f"{argument.premise} {opening} {argument.hypothesis}",
        f" {argument.reason}, so {right if argument.follows else wrong}.",
    ]


def _task(rng: random.Random) -> Document:
    """Instruction-shaped text: other questions, answered in JSON."""
    premise, form = _admitted(rng).premise, rng.randrange(4)
    reply: dict[str, str | int]
    if form == 0:
        question = f"Who is in the sentence? {premise}"
        reply = {"name": next(word for word in premise.split() if word in NAMES)}
    elif form == 1:
        taxonomy = rng.choice(TAXONOMIES)
        entry = rng.choice(list(taxonomy.parent))
        question = f"What is {entry}?"
        reply = {"answer": f"{capitalized(is_a(taxonomy, entry, taxonomy.parent[entry]))}."}
    elif form == 2:
        question, reply = f"Say the sentence again. {premise}", {"answer": premise}
    else:
        key, other, number = rng.choice(_TEXT_KEYS), rng.choice(_NUMBER_KEYS), rng.randrange(10)
        question = f"Answer in JSON with {key} and {other}: {premise} {number}"
        reply = {key: premise, other: number}
    return [f"[INST] {question} [/INST]", f" {json.dumps(reply)}"]


#: Kinds of documents and how often each comes.
_MIXTURE: Final[dict[Callable[[random.Random], Document], int]] = {
    _discussion: 36,
    _comparison_of_words: 27,
    _fact: 14,
    _task: 12,
    _number_fact: 6,
    _opposites: 4,
    _echo: 4,
    _general: 2,
}


def documents(seed: int) -> Iterator[Document]:
    """Documents without end, the same for the same seed."""
    rng = random.Random(seed)
    kinds, weights = list(_MIXTURE), list(_MIXTURE.values())
    while True:
        first, *middle, last = rng.choices(kinds, weights)[0](rng)
        yield [BOS + first, *middle, last + EOS]
