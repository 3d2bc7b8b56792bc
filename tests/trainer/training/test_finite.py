"""The first bad number is found late, and named by its step."""

import math

import pytest
import torch

from finetune_trainer.errors import Diverged
from finetune_trainer.settings import Ranks
from finetune_trainer.training.finite import FiniteCheck


def test_the_first_of_several_bad_steps_is_named() -> None:
    check = FiniteCheck(Ranks())
    for step, value in enumerate((1.0, 2.0, math.inf, math.nan), 1):
        check.note(torch.tensor(value), step)
    check.check(2)
    with pytest.raises(Diverged, match="at step 3;"):
        check.check(4)


def test_good_numbers_and_no_numbers_pass() -> None:
    check = FiniteCheck(Ranks())
    check.check(1)
    check.note(torch.tensor(1.0), 1)
    check.check(1)
