"""Trials of one process that fall behind: the same ones stop whatever the timing, and however often it is killed."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune_api.spec_pack import Halving
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.packing.halving import AtRung, decide

HALVING = Halving(rungs=[10, 20, 40], reduction_factor=3)


def _losses(trials: int, seed: int) -> list[dict[int, float]]:
    """Return what each trial would measure; some end before the last rung."""
    source = random.Random(seed)
    last = [source.choice([15, 100, 100, 100]) for _ in range(trials)]
    return [{rung: source.choice([0.1, 0.2, 0.3, 0.4]) for rung in HALVING.rungs if rung <= end} for end in last]


def _expected(losses: Sequence[dict[int, float]], together: int) -> dict[int, int]:
    """Return at which rung each trial stops that does: `Halving`, asked rung after rung."""
    stopped: dict[int, int] = {}
    for rung in HALVING.rungs:
        at = [number for number, each in enumerate(losses) if rung in each and number not in stopped]
        for number in at:
            passed = [losses[other][rung] for other in at if other <= max(number, together - 1)]
            if HALVING.is_behind(losses[number][rung], passed):
                stopped[number] = rung
    return stopped


class _Process:
    """Trials that go on at random speeds, and lose what they have not saved when it is killed."""

    def __init__(self, losses: Sequence[dict[int, float]], places: int, holds_all: bool, source: random.Random) -> None:
        self.losses, self.places, self.holds_all, self.source = losses, places, holds_all, source
        self.together = len(losses) if holds_all else places
        self.saved = [0] * len(losses)  #: The last rung that is in a checkpoint.
        self.stopped: dict[int, int] = {}
        self.ended: set[int] = set()

    def run(self, killed_after: int | None) -> None:
        """Run until it is killed, or all trials have ended."""
        known = [{rung: loss for rung, loss in each.items() if rung <= self.saved[number]}
                 for number, each in enumerate(self.losses)]  # fmt: skip
        asking: dict[int, AtRung] = {}
        turns = 0
        while running := [each for each in range(len(known)) if each not in self.ended]:
            seated = [each for each in running if not (self.holds_all and each in asking)][: self.places]
            turns += 1
            if killed_after == turns:
                return
            ready = [each for each in seated if each not in asking]
            if ready and self.source.random() < 0.7:
                number = self.source.choice(ready)
                rung = next((step for step in self.losses[number] if step not in known[number]), None)
                if rung is None:
                    self.ended.add(number)
                    self.saved[number] = 1000
                else:
                    known[number][rung] = self.losses[number][rung]
                    asking[number] = AtRung(rung, known[number][rung])
            decided = decide(asking, known, running, self.together, HALVING)
            assert ready or decided, "all wait for each other"
            for number, why in decided.items():
                rung = asking.pop(number).step
                if why:
                    self.stopped[number] = rung
                    self.ended.add(number)
                if why or self.source.random() < 0.5:
                    self.saved[number] = rung


@pytest.mark.parametrize("holds_all", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_the_same_trials_stop_whatever_the_timing_and_the_kills(seed: int, holds_all: bool) -> None:
    source = random.Random(seed)
    losses, places = _losses(source.randint(1, 12), seed), source.randint(1, 5)
    process = _Process(losses, places, holds_all, source)
    for _ in range(source.randint(0, 6)):
        process.run(killed_after=source.randint(1, 60))
    process.run(killed_after=None)
    assert process.stopped == _expected(losses, process.together)


def test_the_sentence_says_where_it_fell_behind_and_how_many_were_better() -> None:
    known = [{10: 0.5}, {10: 0.25}]
    asking = {number: AtRung(10, each[10]) for number, each in enumerate(known)}
    assert decide(asking, known, [0, 1], 2, HALVING) == {
        0: "Stopped after step 10: evalLoss 0.5, and 1 of 2 trials were better there",
        1: "",
    }


def test_one_waits_for_those_before_it_alone() -> None:
    known = [{10: 0.5}, {}, {10: 0.4}, {}]
    asking = {0: AtRung(10, 0.5), 2: AtRung(10, 0.4)}
    assert decide(asking, known, [0, 1, 2, 3], 1, HALVING) == {0: ""}, "1 has yet to come there"
    assert decide(asking, known, [0, 2, 3], 1, HALVING) == {0: "", 2: ""}, "1 has ended"
    known[1][20] = 0.1
    assert decide(asking, known, [0, 1, 2, 3], 1, HALVING) == {0: "", 2: ""}, "1 is past it"
    assert decide(asking, known[:3], [0, 2], 64, HALVING)[0], "more places than trials"


def test_losses_are_read_from_what_there_is(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.eval_losses() == {}
    published = directory.published / "training/metrics.jsonl"
    published.parent.mkdir(parents=True)
    lines = [{"step": 5, "loss": 1.0}, {"step": 10, "evalLoss": 0.5}, {"step": "x", "evalLoss": 1.0}, [1]]
    published.write_text("\n".join([*map(json.dumps, lines), "{", '{"step": 20, "evalLoss": NaN}', "[" * 5000]))
    assert directory.eval_losses() == {10: 0.5}
    directory.metrics_file.parent.mkdir(parents=True)
    directory.metrics_file.write_text('{"step": 10, "evalLoss": 0.25}\n')
    assert directory.eval_losses() == {10: 0.25}
