"""One setting of a table: the trainer's own command on made-up rows, or reference.py's loop, and what came of it."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = Path(sys.argv[1]).resolve()
GIB = 2**30
#: Whether commands are only tried out: on a CPU, with a few steps of a few short rows, and without TRL and Unsloth.
DRY_RUN = bool(os.environ.get("DRY_RUN"))
DRY_STEPS, DRY_ROWS, DRY_LONGEST = 6, 40, 32
#: Without the engine: rows padded, layers as transformers runs them, 4-bit weights dequantized in every pass.
PLAIN = [
    "training.packing=disabled",
    "training.compile=disabled",
    "quantization.cachedLayers=0",
    "model.attention=sdpa",
]
RECIPE = [*PLAIN, "training.microBatchSize=4", "training.gradientCheckpointing=enabled"]
#: What TRL and Unsloth are fastest with: all rows at once, nothing recomputed.
FASTEST = {"bs": 16, "ga": 1, "gc": False}


def limited(gib: int) -> str:
    """Return the trainer, made to believe that the GPU has `gib` GiB; the whole of it when 0."""
    if not gib or DRY_RUN:
        return ""
    return f"""
import os
from dataclasses import replace
# As the trainer, which is too late here.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import torch
from finetune_trainer.runtime import device
inspect = device.inspect_device
device.inspect_device = lambda *args: replace(inspect(*args), memory_bytes={gib} << 30)
torch.cuda.set_per_process_memory_fraction(({gib} << 30) / torch.cuda.get_device_properties(0).total_memory)
from finetune_trainer.cli import cli
cli()
"""


def write_rows(path: Path, rows: int = 1200, longest: int = 512, answer: str = "") -> None:
    """Write text rows as long as reference.py's: 200 to 512 tokens, 325 on average, or in proportion to `longest`."""
    rnd = random.Random(0)
    if DRY_RUN:
        rows, longest = min(rows, DRY_ROWS), DRY_LONGEST
    # t1, t2 and t3 are special tokens, which the tokenizer would find at the start of t123.
    words = [f"t{number}" for number in range(10, 32768) if str(number)[0] not in "123"]
    with path.open("w") as file:
        for _ in range(rows):
            count = min(longest, max(longest * 200 // 512, int(rnd.gauss(325, 45) * longest / 512)))
            file.write(json.dumps({"text": " ".join(rnd.choices(words, k=count)) + answer}) + "\n")


def reference(options: dict[str, Any], command: str = "run", python: str = sys.executable) -> None:
    """Let reference.py measure the same rows on TRL (`run`) or on Unsloth, and print what it found."""
    if DRY_RUN:
        return
    subprocess.run([python, HERE / "reference.py", command, MODEL, json.dumps(options)], check=False)


def launch(
    folder: Path, name: str, settings: list[str], command: list[Any], **options: Any
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run `command` on a job with `settings`, in a folder of the setting `name`; return both."""
    work = folder / "".join(c if c.isalnum() else "-" for c in name)
    work.mkdir()
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "benchmark"},
        "spec": {
            "model": {"source": f"file://{MODEL}"},
            "dataset": {"train": f"file://{folder}/train.jsonl"},
            "output": {"uri": f"file://{work}/out"},
        },
    }
    (work / "job.yaml").write_text(json.dumps(manifest))
    environment = {
        "FINETUNE_SCRATCH_DIR": str(work / "scratch"),
        "FINETUNE_TERMINATION_LOG": str(work / "report.json"),
        "FINETUNE_LISTEN": "127.0.0.1:0",
        "FINETUNE_CACHE_DIR": str(folder / "cache"),  # what one setting compiles the next one finds
    }
    if DRY_RUN:
        settings = [*settings, "resources.gpusPerNode=0"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, *command, "--config", work / "job.yaml", *words]
    return work, subprocess.run(command, env=os.environ | environment | options.pop("env", {}), text=True, **options)


def in_turn(folder: Path, script: Path, settings: list[dict[str, Any]]) -> None:
    """Let one process train at all `settings` and print what came of each; `script` is in_turn.py or wraps it."""
    rows = max(each["training"]["batch_size"] for each in settings)
    if DRY_RUN:
        settings = [each | {"training": each["training"] | {"max_steps": DRY_STEPS}} for each in settings]
    common = [f"training.batchSize={rows}", "logging.everySteps=10"]
    _, answer = launch(
        folder, "in turn", common, [script], env={"SETTINGS": json.dumps(settings)}, stderr=subprocess.PIPE
    )
    if answer.returncode:
        show([{"setting": "in turn", "exit": answer.returncode, "why": answer.stderr[-3000:]}])


def train(
    folder: Path, name: str, settings: list[str], steps: int, log_every: int, gpus: int = 1, script: str = ""
) -> dict[str, Any]:
    """Run the trainer's own command, or `script`, under torchrun for several GPUs; its metrics and its plan."""
    (folder / "script.py").write_text(script)
    if DRY_RUN:
        steps, log_every = min(steps, DRY_STEPS), 1
    layout = [f"training.maxSteps={steps}", f"logging.everySteps={log_every}", f"resources.gpusPerNode={gpus}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    command = [*torchrun, *([folder / "script.py"] if script else ["-m", "finetune_trainer"])]
    started, began = datetime.now(UTC), time.monotonic()
    work, answer = launch(folder, name, [*layout, *settings], command, capture_output=True)
    wall = time.monotonic() - began
    if answer.returncode:
        return {"setting": name, "exit": answer.returncode, "why": (answer.stdout + answer.stderr)[-1500:]}
    report = json.loads((work / "report.json").read_text())
    lines = [json.loads(line) for line in (work / "out/training/metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokensPerSecond"] for line in lines if line.get("tokensPerSecond")]
    plan = report["executionPlan"]
    measured = 0 if DRY_RUN else plan["measuredPeakMemoryBytes"]
    predicted = plan.get("predictedPeakMemoryBytes", 0)
    events = list(map(as_json, answer.stderr.splitlines()))
    ready = [line["timestamp"] for line in events if _is_ready(line)]
    waited = datetime.fromisoformat(ready[-1]) - started if ready else None
    return {
        "setting": name,
        "seconds_to_first_step": round(waited.total_seconds(), 1) if waited else None,
        "start": next(filter(None, map(_start, events)), None),
        "wall_s": round(wall, 1),
        "step_s": step_seconds(events),
        "tok_s": round(sum(speeds[2:]) / max(1, len(speeds[2:]))),
        "all_tok_s": [round(speed) for speed in speeds],
        "loss": [line["loss"] for line in lines if "loss" in line],
        "peak_gib": round(measured / GIB, 2),
        "predicted_gib": round(predicted / GIB, 2),
        "prediction_error": round(predicted / measured - 1, 3) if measured else None,
        "evaluation_seconds": evaluation_seconds(events),
        "metrics": report.get("metrics"),
        "warnings": [line["event"] for line in events if line.get("level") == "warning"],
        "plan": plan,
    }


def evaluation_seconds(lines: list[dict[str, Any]]) -> list[float]:
    """Return how long each evaluation took, the base model's first: its loss, and its answers if there are any."""
    found: list[float] = []
    for event in (str(line.get("event")) for line in lines):
        if event.startswith("Evaluated "):
            found.append(float(event.split()[-2]))
        elif event.startswith("Answered "):
            found[-1] += float(event.split()[-2])
    return [round(seconds, 1) for seconds in found]


def _start(line: dict[str, Any]) -> dict[str, float] | None:
    """Return the seconds until the first step, and those of each part, if `line` of the log tells."""
    event = str(line.get("event"))
    if not event.startswith("The first step is done, "):
        return None
    parts = {part: value for part, value in line.items() if isinstance(value, float)}
    return {"all": float(event.split(", ")[1].split()[0])} | parts


def step_seconds(lines: list[dict[str, Any]]) -> float | None:
    """Return the mean seconds of a step between log lines without an evaluation between them, the first left out."""
    told = [
        (int(line["event"].split()[1]), datetime.fromisoformat(line["timestamp"]), "loss" in line)
        for line in lines
        if str(line.get("event")).startswith("Step ")
    ]
    pairs = [
        (after - before, (second - first).total_seconds())
        for (before, first, is_loss), (after, second, next_is_loss) in pairwise(told)
        if is_loss and next_is_loss
    ][1:]
    return sum(seconds for _, seconds in pairs) / sum(steps for steps, _ in pairs) if pairs else None


def _is_ready(line: dict[str, Any]) -> bool:
    """Whether training begins after this line of the log."""
    return line.get("stage") == "Training" or "decoder layers are compiled" in line.get("event", "")


def as_json(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line)) if line.startswith("{") else {}
    except ValueError:  # two processes wrote at once
        return {}


def wanted(name: str) -> bool:
    """Whether the words of the command line pick the setting `name`."""
    return not sys.argv[3:] or name.startswith(tuple(sys.argv[3:]))


def show(results: Iterable[dict[str, Any]]) -> None:
    """Print each result as it comes."""
    for result in results:
        print("RESULT", json.dumps(result), flush=True)


def build(shape: str) -> None:
    """Make the model of this command line where it is missing."""
    if not (MODEL / "config.json").exists():
        subprocess.run([sys.executable, HERE / "reference.py", "build", MODEL, shape], check=True)
