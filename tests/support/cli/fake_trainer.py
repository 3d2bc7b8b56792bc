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

ADAPTER = {"manifestDigest": "sha256:" + "0" * 64, "sizeBytes": 1, "baseModel": "m", "rank": 8}


def main() -> None:
    """Publish an adapter, fail, or go on until it is stopped."""
    text = Path(sys.argv[sys.argv.index("--config") + 1]).read_text()
    job = yaml.safe_load(text)
    if job["kind"] == "FineTuneSweep":
        sys.exit(pack(job))
    plan = json.loads((Path(sys.argv[0]).parent / "plan.json").read_text())[job["metadata"]["name"]]
    with (Path(sys.argv[0]).parent / "started").open("a") as log:
        log.write(job["metadata"]["name"] + "\n")
    print("a line of the log")
    if "evalLoss" in plan:
        report = publish(job, text, plan)
    else:
        report = {"stage": "Failed", "reason": plan.get("reason"), "message": plan.get("message", "")}
    if "progress" in plan:
        serve({"/progress": {"stage": "Training", "progress": plan["progress"]}})
    if plan.get("waits"):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
        signal.pause()
    time.sleep(plan.get("seconds", 0))
    Path(os.environ["FINETUNE_TERMINATION_LOG"]).write_text(json.dumps(report))
    sys.exit(plan.get("exit", 0))


def pack(sweep: dict[str, Any]) -> int:
    """Do of each trial what the plan says, as one process does; returns the exit code."""
    plan = json.loads((Path(sys.argv[0]).parent / "plan.json").read_text())
    told, code = Path(os.environ["FINETUNE_TERMINATION_LOG"]), 0
    pages: dict[str, dict[str, Any]] = {}
    read = serve(pages)
    trials, names = sweep["spec"]["trials"], f"{sweep['metadata']['name']}-"
    for trial in sorted(trials, key=lambda trial: bool(plan[names + trial["name"]].get("last"))):
        while plan[names + trial["name"]].get("last") and not read >= pages.keys():
            time.sleep(0.05)  # until it is known that the others have ended
        name = f"{sweep['metadata']['name']}-{trial['name']}"
        with (Path(sys.argv[0]).parent / "started").open("a") as log:
            log.write(name + "\n")
        text = yaml.safe_dump(trial_of(sweep, trial))
        report = plan[name] if "reason" in plan[name] else publish(yaml.safe_load(text), text, plan[name])
        if "reason" not in plan[name]:
            report |= {"adapter": ADAPTER | {"uri": yaml.safe_load(text)["spec"]["output"]["uri"]}}
        code = max(code, report.pop("exit", 0) if report.get("reason") == "Preempted" else 0)
        if "uid" not in sweep["metadata"]:  # else it is a pod's, where nobody reads it
            told.with_name(f"{told.name}.{trial['name']}").write_text(json.dumps(report))
            pages[f"/trials/{trial['name']}/progress"] = report
    told.write_text(json.dumps({"stage": "Succeeded", "reason": "Succeeded"}))
    return code


def trial_of(sweep: dict[str, Any], trial: dict[str, Any]) -> dict[str, Any]:
    """Return the job of a trial."""
    spec = json.loads(json.dumps(sweep["spec"]["template"]))
    for path, value in trial["values"].items():
        section, _, field = path.partition(".")
        spec[section][field] = value
    spec["output"]["uri"] = f"{spec['output']['uri'].rstrip('/')}/{trial['name']}/"
    name = {"name": f"{sweep['metadata']['name']}-{trial['name']}"}
    return {"apiVersion": sweep["apiVersion"], "kind": "FineTuneJob", "metadata": name, "spec": spec}


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


def serve(pages: dict[str, dict[str, Any]]) -> set[str]:
    """Answer with `pages`, by their paths; return those that were read so far, a set that grows."""
    read: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            self.send_response(200 if page else 404)
            self.end_headers()
            self.wfile.write(json.dumps(page).encode())
            if page:
                read.add(self.path)

        def log_message(self, *_: Any) -> None:
            pass

    host, _, port = os.environ["FINETUNE_LISTEN"].rpartition(":")
    threading.Thread(target=HTTPServer((host, int(port)), Handler).serve_forever, daemon=True).start()
    return read


if __name__ == "__main__":
    main()
