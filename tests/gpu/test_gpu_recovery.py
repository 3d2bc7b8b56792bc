"""What a run survives on a real GPU: memory that runs out, and a stop in the middle. Skipped where there is none."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.models import build_model, nli_rows, write_jsonl

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GIB = 2**30


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows of about 500 tokens."""
    folder = tmp_path_factory.mktemp("material")
    build_model(folder / "model", hidden_size=256, layers=4)
    rows = nli_rows(8 * 512)
    texts = [{"text": " ".join(row["text"] for row in rows[i : i + 8])} for i in range(0, len(rows), 8)]
    write_jsonl(folder / "train.jsonl", texts)
    return folder


def start(material: Path, work: Path, **settings: Any) -> subprocess.Popen[str]:
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "gpu", "uid": "11111111-2222-3333-4444-555555555555"},
        "spec": {
            "model": {"source": f"file://{material}/model"},
            "dataset": {"train": f"file://{material}/train.jsonl"},
            "output": {"uri": f"file://{work}/out"},
            "logging": {"everySteps": 1},
        },
    }
    work.mkdir(exist_ok=True)
    (work / "job.yaml").write_text(json.dumps(manifest))
    words = [word for key, value in settings.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    environment = os.environ | {
        "FINETUNE_SCRATCH_DIR": str(work / "scratch"),
        "FINETUNE_TERMINATION_LOG": str(work / "report.json"),
        "FINETUNE_LISTEN": "127.0.0.1:0",
    }
    command = [sys.executable, "-m", "finetune_trainer.main", "--config", str(work / "job.yaml"), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(work: Path) -> list[float]:
    lines = (work / "out/training/metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


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
    plan = json.loads((tmp_path / "report.json").read_text())["executionPlan"]
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
