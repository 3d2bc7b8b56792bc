"""Trials that share one process and its base model, beside one job of as many rows and beside the same job alone."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from runs import (
    DRY_RUN,
    DRY_STEPS,
    GIB,
    HERE,
    MODEL,
    as_json,
    build,
    evaluation_seconds,
    in_turn,
    show,
    step_seconds,
    wanted,
)

#: Rows of a trial's step.
ROWS = 4
RATES = (5e-5, 1e-4, 2e-4, 4e-4)
#: Lines of the log that tell where a trial stands.
TELLING = "at the same time|are compiled|^Step [0-9]*0 |^Evaluat|^Stopped|is published|ran out of memory"


def packed(folder: Path) -> None:
    build("mistral-7b")
    if wanted("jobs"):
        in_turn(folder, HERE / "in_turn.py", [_job(4 * ROWS, 40), _job(ROWS, 60)])
    if wanted("4 trials"):
        trials = [{"training.learningRate": rate} for rate in RATES]
        steps = DRY_STEPS if DRY_RUN else 120
        show([run_sweep(folder, "4 trials", trials, {"maxSteps": steps, "scheduler": "constant"})])


def _job(rows: int, steps: int) -> dict[str, Any]:
    return {
        "setting": f"one job of {rows} rows",
        "training": {"batch_size": rows, "max_steps": steps, "scheduler": "constant"},
    }


def run_sweep(
    folder: Path,
    name: str,
    trials: list[dict[str, Any]],
    training: dict[str, Any],
    template: dict[str, Any] | None = None,
    **sweep_spec: Any,
) -> dict[str, Any]:
    """Train `trials` in one process; their speed together is the median: the last steps wait for publications.

    Args:
        folder: Where the rows lie.
        name: Of the setting.
        trials: The values of each.
        training: What the template's `training` has besides the rows of a step.
        template: More of the template.
        **sweep_spec: More of the FineTuneSweep's spec.
    """
    if DRY_RUN:
        trials = trials[:2]
    work = folder / name.replace(" ", "-").replace(",", "")
    work.mkdir()
    job = {
        "model": {"source": f"file://{MODEL}"},
        "dataset": {"train": f"file://{folder}/train.jsonl"},
        "training": {"batchSize": ROWS} | training,
        "logging": {"everySteps": 1 if DRY_RUN else 10},
        "resources": {"gpusPerNode": 0 if DRY_RUN else 1},
        "output": {"uri": f"file://{work}/out"},
    }
    for key, values in (template or {}).items():
        job[key] = job.get(key, {}) | values
    named = [{"name": f"t{number}", "values": values} for number, values in enumerate(trials)]
    sweep = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneSweep",
        "metadata": {"name": "benchmark"},
        "spec": {
            "template": job,
            "trials": named,
            "parallelism": len(trials),
            "objective": {"metric": "trainLoss"},
            **sweep_spec,
        },
    }
    (work / "sweep.yaml").write_text(json.dumps(sweep))
    environment = {
        "FINETUNE_SCRATCH_DIR": str(work / "scratch"),
        "FINETUNE_TERMINATION_LOG": str(work / "report.json"),
        "FINETUNE_LISTEN": "127.0.0.1:0",
        "FINETUNE_CACHE_DIR": str(folder / "cache"),
    }
    began = time.time()
    command = [sys.executable, "-m", "finetune_trainer", "--config", str(work / "sweep.yaml")]
    code = _logged(command, environment, work / "log")
    seconds, lines = time.time() - began, [as_json(line) for line in (work / "log").read_text().splitlines()]
    result: dict[str, Any] = {"setting": name, "exit": code, "seconds": round(seconds, 1)}
    result["warnings"] = [line["event"] for line in lines if line.get("level") in ("warning", "error")]
    stamps = {"compiled": "decoder layers are compiled", "trained": "Publishing the adapter"}
    for key, said in stamps.items():
        if found := next((line for line in lines if said in line.get("event", "")), None):
            result[f"seconds_{key}"] = round(datetime.fromisoformat(found["timestamp"]).timestamp() - began, 1)
    told = [line["event"].split()[0] for line in lines if "trials train at the same time" in line.get("event", "")]
    result["at_once"] = int(told[-1]) if told else len(trials)
    if code:
        return result | {"why": (work / "log").read_text()[-2500:]}
    reports = [json.loads((work / f"report.json.t{number}").read_text()) for number in range(len(trials))]
    files = [work / "out" / f"t{number}" / "training/metrics.jsonl" for number in range(len(trials))]
    speeds = [
        [line["tokensPerSecond"] for line in map(json.loads, file.read_text().splitlines()) if "loss" in line]
        for file in files
        if file.exists()
    ]
    plan = reports[0]["executionPlan"]
    measured = max(report["executionPlan"].get("measuredPeakMemoryBytes", 0) for report in reports)
    predicted = plan.get("predictedPeakMemoryBytes", 0)
    of_trial = [[line for line in lines if line.get("trial") == f"t{number}"] for number in range(len(trials))]
    together = [sum(at) for at in zip(*speeds, strict=False)]
    return result | {
        "tok_s": round(statistics.median(together)),
        "all_tok_s": [round(each) for each in together],
        "peak_gib": round(measured / GIB, 2),
        "predicted_gib": round(predicted / GIB, 2),
        "step_s": [step_seconds(each) for each in of_trial],
        "evaluation_s": [evaluation_seconds(each) for each in of_trial],
        "metrics": [report.get("metrics") for report in reports],
        "published": [file.exists() for file in files],
        "plan": plan,
    }


def _logged(command: list[str], environment: dict[str, str], path: Path) -> int:
    """Run `command` with its log at `path`; show on stderr where the trials stand. Returns its exit code."""
    began = time.monotonic()
    with path.open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            told = as_json(line)
            if re.search(TELLING, str(told.get("event"))):
                seconds = time.monotonic() - began
                print(f"{seconds:6.1f} s  {told.get('trial', '')}  {told['event']}", file=sys.stderr, flush=True)
    return process.wait()
