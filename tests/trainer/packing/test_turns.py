"""Functions that take turns: one at a time, each with the generators that it had."""

import random

import torch

from finetune_trainer.packing.turns import Turns


def _draws(seed: int, found: list[float]) -> "Turns[int, str]":
    def work(turn: "Turns[int, str]") -> None:
        random.seed(seed)
        torch.manual_seed(seed)
        for number in range(3):
            found.append(float(torch.rand(())) + random.random())
            assert turn.wait(number) == f"answer {number}"

    return Turns("draws", work)


def test_each_has_the_random_numbers_that_it_has_alone() -> None:
    alone: list[float] = []
    turn = _draws(1, alone)
    for answer in (None, "answer 0", "answer 1", "answer 2"):
        turn.resume(answer)
    mine: list[float] = []
    others: list[float] = []
    first, second = _draws(1, mine), _draws(2, others)
    before = torch.get_rng_state()
    assert (first.resume(), second.resume()) == (0, 0)
    assert (second.resume("answer 0"), first.resume("answer 0")) == (1, 1)
    assert (first.resume("answer 1"), first.resume("answer 2")) == (2, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert mine == alone and others[0] != mine[0]


def test_an_error_is_raised_where_the_answer_is_awaited() -> None:
    caught: list[BaseException] = []

    def work(turn: "Turns[int, str]") -> None:
        try:
            turn.wait(0)
        except ValueError as error:
            caught.append(error)

    turn = Turns("fails", work)
    assert turn.resume() == 0
    error = ValueError("no")
    assert turn.resume(error) is None
    assert caught == [error]
