"""A stand-in for finetune-trainer that does at once what `plan.json` beside it says of each trial."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import yaml


def main() -> None:
    """Publish an adapter, fail, or go on until it is stopped."""
    text = Path(sys.argv[sys.argv.index("--config") + 1]).read_text()
    job = yaml.safe_load(text)
    plan = json.loads((Path(sys.argv[0]).parent / "plan.json").read_text())[job["metadata"]["name"]]
    with (Path(sys.argv[0]).parent / "started").open("a") as log:
        log.write(job["metadata"]["name"] + "\n")
    print("a line of the log")
    if "evalLoss" in plan:
        report = publish(job, text, plan)
    else:
        report = {"stage": "Failed", "reason": plan.get("reason"), "message": plan.get("message", "")}
    if "progress" in plan:
        serve({"stage": "Training", "progress": plan["progress"]})
    if plan.get("waits"):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
        signal.pause()
    time.sleep(plan.get("seconds", 0))
    Path(os.environ["FINETUNE_TERMINATION_LOG"]).write_text(json.dumps(report))
    sys.exit(plan.get("exit", 0))


def publish(job: dict[str, Any], text: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Write an adapter; returns the report."""
    folder = Path(job["spec"]["output"]["uri"].removeprefix("file://"))
    (folder / "training").mkdir(parents=True, exist_ok=True)
    metrics = {"evalLoss": plan["evalLoss"], "trainSeconds": 60}
    (folder / "training/job.yaml").write_text(text)
    record = {
        "path": "training/job.yaml",
        "sizeBytes": len(text.encode()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    manifest = {"schemaVersion": 1, "kind": "Adapter", "createdAt": "2026-01-01T00:00:00Z"}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": [record], "metrics": metrics}))
    return {"stage": "Succeeded", "reason": "Succeeded", "metrics": metrics}


def serve(report: dict[str, Any]) -> None:
    """Answer /progress."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(report).encode())

        def log_message(self, *_: Any) -> None:
            pass

    host, _, port = os.environ["FINETUNE_LISTEN"].rpartition(":")
    threading.Thread(target=HTTPServer((host, int(port)), Handler).serve_forever, daemon=True).start()


if __name__ == "__main__":
    main()
