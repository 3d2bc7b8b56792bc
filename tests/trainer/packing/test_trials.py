"""What one trial of a process may do to the others: nothing. Trials and passes are played, no model is loaded."""

import contextlib
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from finetune_api.exit_codes import ExitCode
from finetune_api.manifest import load_text
from finetune_api.spec_pack import Halving
from finetune_trainer.context import RunContext
from finetune_trainer.engine.packed_pass import Share
from finetune_trainer.errors import ConfigInvalid, Diverged, Outperformed, Preempted, WontFit
from finetune_trainer.evaluation.lockstep import EvaluationAborted
from finetune_trainer.packing import trials as module
from finetune_trainer.packing.pack import Pack
from finetune_trainer.packing.seat import Seat
from finetune_trainer.packing.trials import Trial, TrialRunner
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.runtime.signals import StopFlag
from finetune_trainer.settings import Environment
from support.trainer.process import job

Play = Callable[[RunContext, "Steps"], None]
PLACES = 2


class PlayedPack(Pack):
    """A pack whose passes give each share its place as loss."""

    passes: list[list[int]]
    holds = False
    interrupt: Callable[[int], None] = staticmethod(lambda number: None)  #: Called with the number of each pass.

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.places, self.holds_all = min(PLACES, self._at_once), self.holds
        PlayedPack.passes = []

    def enter(self, place: int, model: Any, spec: Any) -> None:
        if model == "too large":
            raise WontFit("no memory left")

    def run(self, shares: Sequence[Share]) -> list[torch.Tensor | BaseException]:
        self.passes.append([share.place for share in shares])
        self.interrupt(len(self.passes))
        return [torch.tensor(float(share.place)) for share in shares]


class Steps:
    """What a played trial does, and a common record of what happened."""

    def __init__(self, ctx: RunContext, told: list[str]) -> None:
        seat = ctx.sharing
        assert isinstance(seat, Seat)
        self.ctx, self.seat, self.told = ctx, seat, told
        self.name = ctx.settings.job.metadata.name

    def train(self, count: int) -> None:
        for number in range(count):
            if self.ctx.stop:
                self.save()
            self.seat.turn.wait(Share(self.seat.place, {}, torch.ones(())))
            self.told.append(f"{self.name} step {number + 1}")

    def save(self) -> None:
        self.told.append(f"{self.name} saved")
        raise Preempted("asked to stop")


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Trial], list[str]]]:
    """Run trials that are played by functions of their names; returns them, and what happened."""
    template = yaml.safe_load(job(tmp_path / "job", tmp_path / "model", {}).read_text())
    monkeypatch.setattr(module, "Pack", PlayedPack)
    monkeypatch.setattr(module, "log", Mock())  # tracebacks take a second each to be drawn

    def run(stop: StopFlag | None = None, halving: Halving | None = None, **plays: Play) -> Any:
        told: list[str] = []

        def fake(ctx: RunContext) -> None:
            plays[ctx.settings.job.metadata.name](ctx, Steps(ctx, told))

        monkeypatch.setattr(module, "run", fake)
        trials = []
        for name in plays:
            data = template | {"metadata": {"name": name}}
            model = {"source": "hf://org/base"}
            data = data | {"spec": data["spec"] | {"model": model, "output": {"uri": f"file://{tmp_path}/out/{name}"}}}
            trials.append(Trial(name, load_text(yaml.safe_dump(data), name), Reporter()))
        environment = Environment.from_env(os.environ)
        flag = StopFlag() if stop is None else stop
        TrialRunner(trials, PLACES, environment, flag, tmp_path / "work", {}, halving).run()
        return trials, told

    return run


def _trains(count: int) -> Play:
    return lambda ctx, steps: steps.train(count)


def _raises(error: BaseException, after: int = 1) -> Play:
    def play(ctx: RunContext, steps: Steps) -> None:
        steps.train(after)
        raise error

    return play


@pytest.mark.parametrize(
    "error",
    [
        Diverged("NaN"),
        OSError(28, "No space left on device"),
        WontFit("no room"),
        ConfigInvalid("no"),
        Outperformed("behind"),
        MemoryError(),
        SystemExit(3),
        KeyboardInterrupt(),
        RecursionError("deep"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("after", [0, 2])
def test_however_a_trial_ends_the_others_go_on(played: Any, error: BaseException, after: int) -> None:
    trials, told = played(first=_raises(error, after), long=_trains(6), third=_trains(2))
    assert [trial.failure is None for trial in trials] == [isinstance(error, Outperformed), True, True]
    assert {line for line in told if line.startswith("long")} == {f"long step {number}" for number in range(1, 7)}
    assert "third step 2" in told


def test_a_trial_with_more_steps_than_the_others_goes_on_alone_and_takes_none_of_their_places(played: Any) -> None:
    trials, told = played(long=_trains(9), a=_trains(2), b=_trains(2), c=_trains(2))
    assert all(trial.failure is None for trial in trials)
    assert told.index("c step 2") < told.index("long step 9") and told.count("long step 9") == 1


def test_asked_to_stop_those_that_train_save_before_any_other_begins(played: Any) -> None:
    """Two dozen that begin would each read a checkpoint first, and use up the time that a pod has to save."""
    stop = StopFlag()

    def asked(ctx: RunContext, steps: Steps) -> None:
        steps.train(2)
        stop.set("SIGTERM")
        stop.disarm()
        steps.train(1)

    def at_rung(ctx: RunContext, steps: Steps) -> None:
        try:
            steps.seat.why_stopped(10, 0.5)
        except EvaluationAborted:
            steps.save()

    def never(ctx: RunContext, steps: Steps) -> None:
        steps.told.append(f"{steps.name} began")

    trials, told = played(stop, Halving(rungs=[10]), waits=at_rung, asked=asked, c=never, d=never)
    assert sorted(line for line in told if "step" not in line) == ["asked saved", "waits saved"]
    assert [trial.failure and trial.failure.exit_code for trial in trials] == [ExitCode.PREEMPTED] * 4
    assert trials[2].failure.message == "Asked to stop (SIGTERM) before it began"


def test_a_process_that_is_asked_to_stop_as_its_last_seated_trial_ends_is_not_done(played: Any) -> None:
    stop = StopFlag()

    def ends(ctx: RunContext, steps: Steps) -> None:
        stop.set("SIGTERM")
        stop.disarm()

    trials, _ = played(stop, a=ends, b=_trains(1))
    assert trials[0].failure is None and trials[1].failure.exit_code == ExitCode.PREEMPTED


def test_what_a_trial_has_written_goes_with_it_and_what_others_read_stays(played: Any, tmp_path: Path) -> None:
    """Checkpoints of all trials of a pack would fill the disk that the last of them still needs."""
    seen: list[list[str]] = []

    def writes(ctx: RunContext, steps: Steps) -> None:
        directory = ctx.directory
        for folder in (
            directory.inputs,
            directory.checkpoint(3),
            directory.adapter,
            directory.published,
            directory.best,
        ):
            folder.mkdir(parents=True)
            (folder / "file").write_bytes(b"x" * 1000)
        steps.train(1)

    def looks(ctx: RunContext, steps: Steps) -> None:
        files = (tmp_path / "work/trials/first").rglob("*")
        seen.append(sorted(path.relative_to(tmp_path / "work/trials/first").as_posix() for path in files))

    played(first=writes, b=_trains(1), c=_trains(1), last=looks)
    assert seen == [["inputs", "inputs/file", "log.txt"]]


def test_losses_of_a_trial_that_has_gone_still_count_at_the_rungs(played: Any) -> None:
    """One in two goes on: the second is compared with the first, whose files are deleted by then."""

    def first(ctx: RunContext, steps: Steps) -> None:
        ctx.metrics.log(10, {"evalLoss": 0.1})

    def second(ctx: RunContext, steps: Steps) -> None:
        steps.told.append(steps.seat.why_stopped(10, 0.5))

    _, told = played(None, Halving(rungs=[10], reduction_factor=2), first=first, second=second)
    assert told == ["Stopped after step 10: evalLoss 0.5, and 1 of 2 trials were better there"]


def test_all_trials_take_the_commit_on_which_any_of_them_was_trained(
    played: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's branch may have moved: a trial that has no checkpoint yet must not choose another for one that has."""
    asked: list[str] = []

    class Manager:
        def __init__(self, settings: Any) -> None:
            self.name = settings.job.metadata.name

        def pinned_commit(self) -> str | None:
            asked.append(self.name)
            return "c" * 40 if self.name == "third" else None

    monkeypatch.setattr(module, "CheckpointManager", Manager)
    found: list[str | None] = []

    def begins(ctx: RunContext, steps: Steps) -> None:
        found.append(ctx.sharing.pinned_commit(lambda: None))

    played(first=begins, second=begins, third=begins)
    assert found == ["c" * 40] * 3 and asked == ["first", "second", "third"], "asked once for all"


@pytest.mark.parametrize("last_words", ["", "too large"])
def test_one_that_waits_at_a_rung_gives_its_place_to_the_next(
    played: Any, monkeypatch: pytest.MonkeyPatch, last_words: str
) -> None:
    """All come to the rung, two at a time; the better half goes on, in whatever place there is."""
    monkeypatch.setattr(PlayedPack, "holds", True)

    def halved(loss: float, model: str = "") -> Play:
        def play(ctx: RunContext, steps: Steps) -> None:
            steps.seat._model = model
            steps.train(2)
            if why := steps.seat.why_stopped(10, loss):
                raise Outperformed(why)
            steps.train(2)

        return play

    plays = {"a": halved(0.4), "b": halved(0.2), "c": halved(0.3), "d": halved(0.1, last_words)}
    trials, told = played(None, Halving(rungs=[10], reduction_factor=2), **plays)
    steps = [line for line in told if "step" in line]
    assert [line[0] for line in steps[:8]] == list("ababcdcd")
    assert [bool(trial.stopped) for trial in trials] == [True, False, True, False]
    assert trials[1].failure is None and {*steps[8:]} >= {"b step 1", "b step 2"}
    if last_words:
        assert str(trials[3].failure.message).startswith("no memory left")
    else:
        assert PlayedPack.passes == [[0, 1]] * 6 and trials[3].failure is None


class _Killed(BaseException):
    """The process is gone: no trial goes on."""


@dataclass
class _Stored:
    """What the store has of a trial."""

    step: int = 0
    ended: bool = False
    why: str = ""


def _lives(stored: _Stored, losses: Sequence[float], last: int, diverges: int | None, saves_every: int) -> Play:
    """Train `last` steps, and go on where the store says; the held-out loss of each step is given."""

    def play(ctx: RunContext, steps: Steps) -> None:
        for step in range(1, stored.step + 1):
            ctx.metrics.log(step, {"evalLoss": losses[step]})
        if stored.why:
            raise Outperformed(stored.why)
        if stored.ended and stored.step < last:
            raise Diverged("as before")
        for step in range(stored.step + 1, 0 if stored.ended else last + 1):
            if ctx.stop:
                stored.step = step - 1
                raise Preempted("asked to stop")
            steps.train(1)
            if step == diverges:
                stored.step, stored.ended = step - 1, True
                raise Diverged("NaN")
            try:
                found = steps.seat.why_stopped(step, losses[step]) if steps.seat.is_rung(step) and step < last else ""
            except EvaluationAborted:
                stored.step = step - 1
                raise Preempted("asked to stop") from None
            ctx.metrics.log(step, {"evalLoss": losses[step]})
            if found:
                stored.step, stored.ended, stored.why = step, True, found
                raise Outperformed(found)
            if step % saves_every == 0:
                stored.step = step
        stored.step, stored.ended = last, True

    return play


@pytest.mark.parametrize("holds", [False, True], ids=["few fit", "all fit"])
@pytest.mark.parametrize("seed", range(12))
def test_whatever_ends_and_interrupts_them_the_same_trials_stop_and_none_waits_forever(
    seed: int, holds: bool, played: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have fewer steps than rungs, or more; one diverges; the process is killed, or asked to stop, at any pass."""
    source = random.Random(seed)
    count = source.randint(1, 6)
    rungs = sorted(source.sample(range(1, 8), source.randint(1, 3)))
    halving = Halving(rungs=rungs, reduction_factor=source.choice([2, 3]))
    monkeypatch.setattr(sys.modules[__name__], "PLACES", source.randint(1, 4))
    monkeypatch.setattr(PlayedPack, "holds", holds)
    lives = [
        (
            [source.choice([0.1, 0.2, 0.3, 0.4]) for _ in range(9)],
            source.randint(1, 8),
            source.choice([None, None, None, 1, 3]),
            source.choice([1, 2, 100]),
        )
        for _ in range(count)
    ]

    def run(stored: list[_Stored], moment: int = 0, kill: bool = False) -> None:
        stop = StopFlag()

        def interrupt(number: int) -> None:
            if number == moment and kill:
                raise _Killed
            if number == moment:
                stop.set("SIGTERM")
                stop.disarm()

        monkeypatch.setattr(PlayedPack, "interrupt", staticmethod(interrupt))
        played(stop, halving, **{f"t{number}": _lives(stored[number], *life) for number, life in enumerate(lives)})

    unbroken = [_Stored() for _ in lives]
    run(unbroken)
    assert all(each.ended for each in unbroken)
    broken = [_Stored() for _ in lives]
    for _ in range(4):
        with contextlib.suppress(_Killed):
            run(broken, source.randint(1, 20), source.random() < 0.5)
    run(broken)
    assert broken == unbroken
