"""What a run survives on a real GPU: memory that runs out, and a stop in the middle. Skipped where there is none."""

import time
from pathlib import Path
from typing import Any

import pytest

from support.trainer.gpu import losses, report, start

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GIB = 2**30


def test_a_gpu_that_is_half_taken_halves_the_micro_batch_and_keeps_the_batch(material: Path, tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 3 * GIB, dtype=torch.uint8, device="cuda")
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


#: Within what the GPU has left at step 2, times this, the run must go on: a real out-of-memory of its own allocator.
LIMIT = """
import torch
from finetune_trainer.training.loop import QloraTrainer
compute_loss = QloraTrainer.compute_loss
limited = False
def limit(self, *args, **options):
    global limited
    if self.state.global_step == 2 and not limited:
        limited, peak = True, torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved()
        allowed = held + {part} * (peak - held)
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    return compute_loss(self, *args, **options)
QloraTrainer.compute_loss = limit
"""


def test_memory_that_runs_out_at_a_later_step_halves_the_micro_batch_from_there(material: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "training__batchSize": 64,
        "training__microBatchSize": 64,
        "training__maxSteps": 6,
        "training__gradientCheckpointing": "disabled",
        "lora__dropout": 0.0,
    }
    for name, prelude in (("free", ""), ("limited", LIMIT.format(part=0.75))):
        run = start(material, tmp_path / name, prelude, **settings)
        log, _ = run.communicate(timeout=300)
        assert run.returncode == 0, log[-3000:]
    assert "The GPU ran out of memory at micro-batch 64: retrying with 32" in log
    assert len(losses(tmp_path / "limited")) == 6
    assert losses(tmp_path / "limited") == pytest.approx(losses(tmp_path / "free"), rel=1e-2)


def test_memory_that_runs_out_at_micro_batch_1_ends_the_run_with_what_to_change(material: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training__batchSize": 2, "training__microBatchSize": 1, "training__maxSteps": 6}
    run = start(material, tmp_path, LIMIT.format(part=0.02), **settings)
    log, _ = run.communicate(timeout=300)
    assert run.returncode == 90, log[-3000:]
    assert "at micro-batch 1: lower training.maxLength" in report(tmp_path)["message"]
