"""Measure how much CPU time the trainer needs to refuse bad input, beside a run that imports everything.

    python benchmarks/refusals.py

Prints user and system seconds of each process, children included. The goal is at most 2 s for each refusal.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

JOB: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "refused"},
    "spec": {
        "model": {"source": "file:///nowhere"},
        "dataset": {"train": "file://./train.jsonl"},
        "resources": {"gpusPerNode": 0},
        "output": {"uri": "file://./out"},
    },
}
#: What is wrong: settings, environment, the rows.
CASES = {
    "a manifest with a wrong type": (["lora.rank=x"], {}, '{"text": "fine"}'),
    "an output that cannot be written": (["output.uri=file:///proc/adapter"], {}, '{"text": "fine"}'),
    "a store without credentials": (
        ["output.uri=s3://bucket/adapter"],
        {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "FINETUNE_STORE_PATIENCE": "0"},
        '{"text": "fine"}',
    ),
    "a data file that is missing": (["dataset.train=file:///nowhere.jsonl"], {}, '{"text": "fine"}'),
    "a bad row": ([], {}, '{"text": 3}'),
}


def main() -> None:
    """Refuse each case once in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for name, (changes, environment, row) in CASES.items():
            print(json.dumps({"case": name, **_refuse(Path(folder), changes, environment, row)}))


def _refuse(folder: Path, changes: list[str], environment: dict[str, str], row: str) -> dict[str, object]:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text("{}")
    (folder / "train.jsonl").write_text(row + "\n")
    job = JOB | {"spec": JOB["spec"] | {"model": {"source": f"file://{folder}/model"}}}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    settings = {
        "FINETUNE_SCRATCH_DIR": str(folder / "scratch"),
        "FINETUNE_TERMINATION_LOG": str(folder / "report.json"),
        "FINETUNE_SECRETS_DIR": str(folder / "secrets"),
        "FINETUNE_LISTEN": "127.0.0.1:0",
    }
    options = [word for change in changes for word in ("--set", change)]
    command = [sys.executable, "-m", "finetune_trainer", "--config", str(folder / "job.yaml"), *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(command, env=os.environ | settings | environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    message = json.loads((folder / "report.json").read_text() or "{}").get("message", run.stderr[-200:])
    return {
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "exit_code": run.returncode,
        "message": message,
    }


if __name__ == "__main__":
    main()
