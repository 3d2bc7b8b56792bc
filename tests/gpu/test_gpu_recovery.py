"""What a run survives on a real GPU: memory that runs out, and a stop in the middle. Skipped where there is none."""

import time
from pathlib import Path
from typing import Any

import pytest

from support.gpu import losses, report, start

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GIB = 2**30


def test_a_gpu_that_is_half_taken_halves_the_micro_batch_and_keeps_the_batch(material: Path, tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 5 * GIB, dtype=torch.uint8, device="cuda")
    run = start(
        material,
        tmp_path,
        training__batchSize=256,
        training__microBatchSize=256,
        training__maxSteps=4,
        training__gradientCheckpointing="disabled",
    )
    log, _ = run.communicate(timeout=300)
    assert run.returncode == 0, log[-3000:]
    plan = report(tmp_path)["executionPlan"]
    assert plan["microBatchSize"] < 256
    assert plan["microBatchSize"] * plan["gradientAccumulationSteps"] == 256
    assert taken.numel()


def test_a_stopped_run_goes_on_with_the_losses_of_an_unbroken_one(material: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training__batchSize": 8, "training__microBatchSize": 8, "training__maxSteps": 40}
    whole = start(material, tmp_path / "whole", **settings)
    log, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, log[-3000:]

    broken = start(material, tmp_path / "broken", **settings)
    assert broken.stdout is not None
    for line in broken.stdout:
        if "Step 12" in line:
            break
    asked = time.monotonic()
    broken.terminate()
    log, _ = broken.communicate(timeout=60)
    print(f"RESULT seconds from SIGTERM to exit: {time.monotonic() - asked:.1f}")
    assert broken.returncode == 75, log[-3000:]
    resumed = start(material, tmp_path / "broken", **settings)
    log, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, log[-3000:]

    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "broken")
    print("RESULT largest difference of a loss:", max(abs(a - b) for a, b in zip(expected, found, strict=True)))
    assert found == pytest.approx(expected, rel=1e-2)
