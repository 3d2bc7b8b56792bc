"""Collective helpers with one process; scenarios/test_distributed.py has several."""

from finetune_trainer.runtime import distributed
from finetune_trainer.runtime.distributed import all_reduce_any, run_on_rank_zero
from finetune_trainer.settings import Ranks


class _Refused(Exception):
    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")


def test_one_process_decides_alone() -> None:
    assert run_on_rank_zero(Ranks(), lambda: 7) == 7
    assert all_reduce_any(Ranks(), True, False) == [True, False]


def test_an_error_that_cannot_be_sent_keeps_its_text() -> None:
    sent = distributed._picklable(_Refused("output.uri", "is taken"))
    assert (type(sent), str(sent)) == (RuntimeError, "output.uri: is taken")
    assert isinstance(distributed._picklable(KeyError("x")), KeyError)
