"""Trials of a sweep that share a GPU: each has the losses and the adapter that it has alone. Skipped without one."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

#: The first ends early: the second goes on alone, its passes replayed as CUDA graphs.
TRIALS: dict[str, dict[str, Any]] = {
    "short": {"lora.rank": 8, "training.maxSteps": 6},
    "long": {"lora.rank": 32, "training.learningRate": 4e-4},
}
SETTINGS = {"training__batchSize": 2, "training__maxSteps": 30, "lora__dropout": 0.0}


def test_trials_that_share_a_gpu_are_those_that_have_it_alone(material: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from support.trainer.gpu import losses, start, start_sweep

    together = start_sweep(material, tmp_path / "together", TRIALS, **SETTINGS)
    alone = {
        name: start(
            material, tmp_path / name, **SETTINGS | {key.replace(".", "__"): each for key, each in changes.items()}
        )
        for name, changes in TRIALS.items()
    }
    logs = {name: process.communicate(timeout=300)[0] for name, process in {"together": together, **alone}.items()}
    for name, process in {"together": together, **alone}.items():
        assert process.returncode == 0, logs[name][-3000:]
    told = [line for line in logs["together"].splitlines() if "CUDA graphs" in line]
    print("RESULT", *told, sep="\n")
    assert any("the first replayed pass is the launched one" in line or "disabled" in line for line in told)
    for name in TRIALS:
        shared = tmp_path / "together/out" / name
        lines = (shared / "training/metrics.jsonl").read_text().splitlines()
        found, expected = [line["loss"] for line in map(json.loads, lines) if "loss" in line], losses(tmp_path / name)
        differences = [abs(ours / theirs - 1) for ours, theirs in zip(found, expected, strict=True)]
        print(f"RESULT {name}: losses of {len(found)} steps differ by {max(differences):.2g} at most")
        assert max(differences) < 5e-3
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (shared, tmp_path / name / "out"))
        assert ours.keys() == theirs.keys()
        for key, weight in ours.items():
            likeness = torch.nn.functional.cosine_similarity(weight.flatten(), theirs[key].flatten(), dim=0)
            assert float(likeness) > 0.99, key
