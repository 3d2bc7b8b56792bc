"""Passes replayed as CUDA graphs compute what launched kernels do, bit for bit. Skipped where there is no GPU."""

from pathlib import Path
from typing import Any

import pytest

from support.trainer.gpu import losses, report, start

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
#: Trains in turn, in one process and so with the same kernels: each time from the same weights and random numbers.
#: "looking" looks at a number on the GPU, which no capture allows; "resumed" begins with the captured run's checkpoint.
IN_TURN = """
import shutil
import torch
from finetune_trainer.checkpoints.manager import CheckpointManager
from finetune_trainer.engine import graphs
from finetune_trainer.methods.sft import Sft
from finetune_trainer.runtime.device import seed
from finetune_trainer.training.hooks import TrainingHooks
from finetune_trainer.training.session import TrainingSession, restore, snapshot

fit, loss, run, record = TrainingSession.fit, Sft.loss, graphs.StepGraphs.run, TrainingHooks._record
upload, lines = CheckpointManager.upload, []

def recorded(self, step, values, **timing):
    lines.append(values)
    record(self, step, values, **timing)

def kept(self, folder, step):
    upload(self, folder, step)
    if step == 60:
        shutil.copytree(folder, f"{PATH}.60", dirs_exist_ok=True)

def looking(self, model, batch):
    found = loss(self, model, batch)
    if torch.cuda.is_current_stream_capturing():
        float(found)
    return found

def in_turn(self, state, checkpoint):
    initial, found = snapshot(self.model), {}
    for name in ("launched", "launched again", "captured", "resumed", "looking"):
        graphs.StepGraphs.run = (lambda *args: None) if name.startswith("launched") else run
        Sft.loss = looking if name == "looking" else loss
        lines.clear()
        seed(self.ctx.spec.training.seed)
        turn = TrainingSession(self.ctx, self.method, self.plan, self.base, self.model, self.data, (), self.checkpoints)
        if name == "resumed":
            folder = shutil.copytree(f"{PATH}.60", self.ctx.directory.checkpoint(60), dirs_exist_ok=True)
            result = fit(turn, self.ctx.directory.take_from_checkpoint(folder), folder)
        else:
            restore(self.model, initial)
            self.ctx.directory.keep_steps(0)
            result = fit(turn, type(state)(fingerprint=state.fingerprint), None)
        found[name] = {
            "loss": [each["loss"] for each in lines if "loss" in each],
            "norm": [each["gradNorm"] for each in lines if "gradNorm" in each],
            "weights": snapshot(self.model),
            "captured": result.plan.captured,
            "peak": result.plan.measured_peak_memory_bytes / result.plan.predicted_peak_memory_bytes,
        }
        print("RESULT", name, found[name]["captured"], found[name]["loss"][::20], found[name]["peak"], flush=True)
    torch.save(found, PATH)
    return result

TrainingHooks._record, TrainingSession.fit, CheckpointManager.upload = recorded, in_turn, kept
"""
#: 4-bit weights dequantized in each pass, norms and dropout recomputed, two passes a step.
FRUGAL: dict[str, Any] = {
    "quantization__cachedLayers": 0,
    "training__gradientCheckpointing": "selective",
    "training__microBatchSize": 8,
}


@pytest.fixture(scope="module", params=["plain", "frugal"])
def found(request: pytest.FixtureRequest, material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each run came to; with the log."""
    work = tmp_path_factory.mktemp(request.param)
    settings: dict[str, Any] = {"training__maxSteps": 100, "checkpoint__everySteps": 60}
    if request.param == "frugal":
        settings |= FRUGAL
    run = start(material, work, f"PATH = {str(work)!r} + '.pt'" + IN_TURN, **settings)
    log, _ = run.communicate(timeout=400)
    assert run.returncode == 0, log[-3000:]
    print(*(line for line in log.splitlines() if line.startswith("RESULT")), sep="\n")
    return dict(torch.load(f"{work}.pt")) | {"log": log, "plan": report(work)["executionPlan"], "name": request.param}


def _assert_same(found: dict[str, Any], name: str, other: str) -> None:
    ours, theirs = found[name], found[other]
    count = len(ours["loss"])
    assert ours["loss"] == theirs["loss"][-count:]
    assert ours["norm"] == theirs["norm"][-count:]
    assert all(torch.equal(each, theirs["weights"][key]) for key, each in ours["weights"].items())


def test_100_captured_steps_are_those_of_launched_kernels_bit_for_bit(found: dict[str, Any]) -> None:
    """With dropout, 8-bit optimizer state and rows that end anywhere."""
    plan = found["plan"]
    assert (plan["compiled"], plan["packing"]) == (True, True)
    if found["name"] == "frugal":
        assert (plan["cachedLayers"], plan["gradientAccumulationSteps"]) == (0, 2)
    assert found["captured"]["captured"] is True, found["log"][-3000:]
    assert len(found["captured"]["loss"]) == 100
    _assert_same(found, "launched again", "launched")
    _assert_same(found, "captured", "launched")


def test_a_run_that_resumes_captures_anew_and_has_the_same_numbers(found: dict[str, Any]) -> None:
    assert found["resumed"]["captured"] is True
    assert len(found["resumed"]["loss"]) == 40
    _assert_same(found, "resumed", "captured")


def test_a_capture_that_fails_is_logged_and_changes_no_number(found: dict[str, Any]) -> None:
    assert found["log"].count("CUDA graphs disabled, launching each kernel (slower)") == 1
    assert found["looking"]["captured"] is False
    _assert_same(found, "looking", "launched")


def test_memory_that_runs_out_is_found_without_graphs(material: Path, tmp_path: Path) -> None:
    """What graphs hold is given back, and the micro-batch stays as it is."""
    prelude = """
import torch
from finetune_trainer.engine import graphs
def full(self, *args):
    raise torch.OutOfMemoryError("CUDA out of memory")
graphs._Pass.replay = full
"""
    run = start(material, tmp_path, prelude, training__maxSteps=8)
    log, _ = run.communicate(timeout=400)
    assert run.returncode == 0, log[-3000:]
    assert "retrying without CUDA graphs" in log
    plan = report(tmp_path)["executionPlan"]
    assert (plan["captured"], plan["microBatchSize"]) == (False, 16)
    assert len(losses(tmp_path)) == 8
