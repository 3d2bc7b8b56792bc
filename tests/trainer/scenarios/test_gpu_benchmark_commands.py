"""The commands of benchmarks/gpu, tried out without a GPU: a machine with one is too dear to find a typing error on."""

from pathlib import Path

import pytest

from support.trainer.gpu_benchmarks import results

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]
#: By table: words that pick settings, and how many results there are.
TABLES = {
    "70b": ((), 1),
    "all-linear": ((), 1),
    "answers": (("generate",), 1),
    "long-rows": ((), 1),
    "moe": (("whole", "losses"), 3),
    "packed": (("4",), 1),
    "small": ((), 8),
    "start": ((), 2),
    "sweep": ((), 4),
    "whole-job": ((), 2),
}


@pytest.mark.parametrize("table", TABLES)
def test_every_setting_trains(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    words, count = TABLES[table]
    found = results(tmp_path / "model", table, *words)
    assert len(found) == count
    assert all(each.get("loss") or each.get("start") or each.get("metrics") for each in found)
