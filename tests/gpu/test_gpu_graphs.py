"""Passes replayed as CUDA graphs compute what launched ones do, bit for bit. Skipped where there is no GPU."""

import signal
import subprocess
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
#: The same micro-batches, filled up alike, but every kernel is launched.
LAUNCHED = "from finetune_trainer.engine import graphs; graphs.StepGraphs.run = lambda *args: None"
#: The loss looks at a number on the GPU, which no capture allows.
LOOKING = """
import torch
from finetune_trainer.methods.sft import Sft
loss = Sft.loss
def looking(self, model, batch):
    found = loss(self, model, batch)
    if torch.cuda.is_current_stream_capturing():
        float(found)
    return found
Sft.loss = looking
"""
#: A stop after step 30, in the middle of everything.
STOPPED = f"""
import os
from finetune_trainer.training.hooks import TrainingHooks
end = TrainingHooks.on_step_end
def stop(self, args, state, control, **options):
    if state.global_step == 30:
        os.kill(os.getpid(), {int(signal.SIGTERM)})
    end(self, args, state, control, **options)
TrainingHooks.on_step_end = stop
"""
SETTINGS: dict[str, Any] = {"training__maxSteps": 100, "evaluation__everySteps": 40}
RUNS = {"captured": "", "launched": LAUNCHED, "looking": LOOKING, "stopped": STOPPED}
#: Weights dequantized in each pass, norms and dropout recomputed, two passes a step.
FRUGAL: dict[str, Any] = {
    "quantization__cachedLayers": 0,
    "training__gradientCheckpointing": "selective",
    "training__microBatchSize": 8,
}


@pytest.fixture(scope="module")
def logs(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The log of each run by its name, and its folder as `<name> in`. They run at the same time."""
    root = tmp_path_factory.mktemp("graphs")
    settings = SETTINGS | {"dataset__eval": f"file://{material}/train.jsonl"}
    running = {name: start(material, root / name, prelude, **settings) for name, prelude in RUNS.items()}
    for name, prelude in (("frugal", ""), ("frugal, launched", LAUNCHED)):
        running[name] = start(material, root / name, prelude, **settings | FRUGAL)
    found = {name: run.communicate(timeout=400)[0] for name, run in running.items()}
    resumed = start(material, root / "stopped", **settings)
    found["resumed"] = resumed.communicate(timeout=400)[0]
    print({name: log[-1500:] for name, log in found.items() if "published" not in log})
    return found | {f"{name} in": str(root / name) for name in running}


def _adapter(logs: dict[str, str], name: str) -> bytes:
    return (Path(logs[f"{name} in"]) / "out/adapter_model.safetensors").read_bytes()


def _losses(logs: dict[str, str], name: str) -> list[float]:
    return losses(Path(logs[f"{name} in"]))


def test_100_captured_steps_are_those_of_launched_kernels_bit_for_bit(logs: dict[str, str]) -> None:
    """With dropout, 8-bit optimizer state, evaluations in between, and rows that end anywhere."""
    plan = report(Path(logs["captured in"]))["executionPlan"]
    assert (plan["captured"], plan["compiled"], plan["packing"]) == (True, True, True), logs["captured"][-3000:]
    assert "CUDA graphs disabled" not in logs["captured"]
    assert len(_losses(logs, "captured")) == 100
    assert _losses(logs, "captured") == _losses(logs, "launched")
    assert _adapter(logs, "captured") == _adapter(logs, "launched")


def test_so_are_those_of_accumulated_passes_with_4_bit_weights_that_recompute(logs: dict[str, str]) -> None:
    plan = report(Path(logs["frugal in"]))["executionPlan"]
    expected = {"captured": True, "cachedLayers": 0, "selectiveCheckpointing": True, "gradientAccumulationSteps": 2}
    assert {name: plan[name] for name in expected} == expected, logs["frugal"][-3000:]
    assert _losses(logs, "frugal") == _losses(logs, "frugal, launched")
    assert _adapter(logs, "frugal") == _adapter(logs, "frugal, launched")


def test_a_capture_that_fails_is_logged_and_changes_no_number(logs: dict[str, str]) -> None:
    assert logs["looking"].count("CUDA graphs disabled, launching each kernel (slower)") == 1
    assert report(Path(logs["looking in"]))["executionPlan"]["captured"] is False
    assert _losses(logs, "looking") == _losses(logs, "captured")


def test_a_stopped_run_goes_on_with_the_same_numbers(logs: dict[str, str]) -> None:
    assert "Resuming from" in logs["resumed"]
    assert _losses(logs, "stopped") == _losses(logs, "captured")
    assert _adapter(logs, "stopped") == _adapter(logs, "captured")


def test_memory_that_runs_out_is_found_without_graphs(material: Path, tmp_path: Path) -> None:
    """What graphs hold is given back, and the micro-batch stays as it is."""
    prelude = """
import torch
from finetune_trainer.engine import graphs
replay = graphs._Pass.replay
def full(self, *args):
    raise torch.OutOfMemoryError("CUDA out of memory")
graphs._Pass.replay = full
"""
    run: subprocess.Popen[str] = start(material, tmp_path, prelude, training__maxSteps=8)
    log, _ = run.communicate(timeout=400)
    assert run.returncode == 0, log[-3000:]
    assert "retrying without CUDA graphs" in log
    plan = report(tmp_path)["executionPlan"]
    assert (plan["captured"], plan["microBatchSize"]) == (False, 16)
    assert len(losses(tmp_path)) == 8
