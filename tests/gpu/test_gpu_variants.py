"""Every bits x checkpointing x precision trains on a real GPU. Skipped where there is none."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.trainer.gpu import losses, report, start

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
COMBINATIONS = list(itertools.product((4, 8, 16), ("disabled", "enabled"), ("bf16", "fp16", "fp32")))


def test_bits_checkpointing_and_precision_go_together(material: Path, tmp_path: Path) -> None:
    def train(combination: tuple[int, str, str]) -> str:
        bits, checkpointing, precision = combination
        work = tmp_path / f"{bits}-{checkpointing}-{precision}"
        run = start(
            material,
            work,
            quantization__bits=bits,
            training__gradientCheckpointing=checkpointing,
            training__precision=precision,
            training__maxSteps=2,
            training__batchSize=4,
        )
        log, _ = run.communicate(timeout=300)
        if run.returncode:
            return f"{combination}: exit code {run.returncode}: {log[-1000:]}"
        found, plan = losses(work), report(work)["executionPlan"]
        well = len(found) == 2 and all(math.isfinite(loss) for loss in found)
        well = well and plan["gradientCheckpointing"] == (checkpointing == "enabled")
        return "" if well else f"{combination}: losses {found}, plan {plan}"

    with ThreadPoolExecutor(4) as pool:
        assert [problem for problem in pool.map(train, COMBINATIONS) if problem] == []


SHARDED = """
from finetune_trainer.planning import layout_search
fitting = layout_search.LayoutSearch._fitting
layout_search.LayoutSearch._fitting = lambda case, shape, sharded: fitting(case, shape, sharded) if sharded else []
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("bits", [4, 16])
def test_weights_shared_out_over_two_gpus_give_the_same_losses(bits: int, material: Path, tmp_path: Path) -> None:
    for name, prelude in (("whole", ""), ("sharded", SHARDED)):
        settings = {"quantization__bits": bits, "training__batchSize": 8, "training__maxSteps": 6}
        run = start(material, tmp_path / name, prelude, gpus=2, **settings)
        log, _ = run.communicate(timeout=300)
        assert run.returncode == 0, log[-3000:]
        assert report(tmp_path / name)["executionPlan"]["sharded"] == (name == "sharded")
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
