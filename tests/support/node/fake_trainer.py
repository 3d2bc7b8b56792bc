"""A trainer that trains nothing: it keeps the real one's contract (exit codes, /progress, termination message), and
does in each attempt what its manifest's dataset.train says, so that a test can tell any story in seconds.

    s3://simulated/fail-65/succeed             attempt 1 exits 65, attempt 2 and later succeed
    s3://simulated/crash-3                     exits 3 without a report
    s3://simulated/oom/succeed                 GPU out of memory; the micro-batch it was given is reported
    s3://simulated/run                         steps until it is told to stop, then saves and exits 75
    s3://simulated/hang                        reports one step and nothing new after it

Of a FineTuneSweep, whose trials share its process, each trial tells what its lora.initFrom says, at the end of the
process's own story: s3://simulated/fail-91 fails with that exit code, behind falls behind, any other succeeds.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from finetune_api import constants, exit_codes

#: Digest of the manifest that a test has published beforehand, for a job whose adapter is really downloaded.
ENV_DIGEST = "SIMULATED_MANIFEST_DIGEST"
STEP_SECONDS = 0.05
TOTAL_STEPS = 20


class Trainer:
    """One simulated attempt."""

    def __init__(self, manifest: dict[str, Any], overrides: list[str]) -> None:
        self.spec = manifest["spec"].get("template", manifest["spec"])
        self.trials = [(trial["name"], trial["values"]) for trial in manifest["spec"].get("trials", ())]
        self.attempt = int(os.environ[constants.ENV_ATTEMPT])
        story = self.spec["dataset"]["train"].removeprefix("s3://simulated/").split("/")
        self.act, _, self.argument = story[min(self.attempt, len(story)) - 1].partition("-")
        micro = [o.partition("=")[2] for o in overrides if "training.microBatchSize=" in o]
        self.micro = int(micro[0]) if micro else 8
        self.stopped = False  # no Event: the handler would wait for a lock that the code it interrupts may hold
        self.step = 0
        self.stage = "Starting"
        self.extra: dict[str, Any] = {}

    def report(self, **more: Any) -> dict[str, Any]:
        progress = {"step": self.step, "totalSteps": TOTAL_STEPS, "loss": round(3 / (1 + self.step), 4)}
        plan = {"microBatchSize": self.micro, "worldSize": 1}
        rows = [{"name": name, "phase": "Running", "step": self.step} for name, _ in self.trials]
        return {"stage": self.stage, "progress": progress, "executionPlan": plan, "trials": rows, **self.extra, **more}

    def finish(self, code: int, message: str = "", **more: Any) -> int:
        self.stage = "Failed" if code else "Succeeded"
        body = self.report(reason=exit_codes.OUTCOMES[code].reason, message=message, **more)
        Path(os.environ[constants.ENV_TERMINATION_LOG]).write_text(json.dumps(body))
        return code

    def run(self) -> int:
        if self.act == "fail":
            return self.finish(int(self.argument), f"simulated exit {self.argument}")
        if self.act == "crash":
            return int(self.argument)
        self.stage = "Training"
        while self.act in ("run", "hang") or self.step < TOTAL_STEPS:
            time.sleep(STEP_SECONDS)
            if self.stopped:
                return self.finish(exit_codes.ExitCode.PREEMPTED, f"saved a checkpoint at step {self.step}")
            self.step = 1 if self.act == "hang" else self.step + 1
            if self.act == "oom" and self.step == 3:
                return self.finish(exit_codes.ExitCode.GPU_OUT_OF_MEMORY, "CUDA out of memory")
        ended = [_row(name, values) for name, values in self.trials]
        best = next((row["name"] for row in ended if row["phase"] == "Succeeded"), "")
        if ended and not best:
            return self.finish(exit_codes.REASONS[ended[0]["reason"]].code, "no trial succeeded", trials=ended)
        adapter = {
            "uri": self.spec["output"]["uri"] + (f"/{best}/" if ended else ""),
            "manifestDigest": os.environ.get(ENV_DIGEST, "sha256:" + "0" * 64),
            "sizeBytes": 4096,
            "baseModel": self.spec["model"]["source"],
            "rank": self.spec["lora"]["rank"],
        }
        return self.finish(0, adapter=adapter, metrics={"trainLoss": 0.5, "evalLoss": 0.6}, trials=ended)


def _row(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return how one trial of several ends, as its lora.initFrom tells."""
    act, _, code = str(values.get("lora.initFrom", "")).rpartition("/")[2].partition("-")
    if act == "fail":
        return {"name": name, "phase": "Failed", "reason": exit_codes.OUTCOMES[int(code)].reason}
    if act == "behind":
        return {"name": name, "phase": "Stopped", "reason": exit_codes.OUTPERFORMED}
    return {"name": name, "phase": "Succeeded", "value": round(0.5 + len(name) / 100, 4)}


def serve(trainer: Trainer) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(trainer.report()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    host, _, port = os.environ[constants.ENV_LISTEN].rpartition(":")
    server = ThreadingHTTPServer((host, int(port)), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def main(arguments: list[str]) -> int:
    manifest = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text())
    overrides = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--set"]
    trainer = Trainer(manifest, overrides)
    signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "stopped", True))
    if int(os.environ.get("RANK", "0")) == 0:
        serve(trainer)
    began = time.monotonic()
    code = trainer.run()
    rank = f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"
    print(f"{rank}: attempt {trainer.attempt} act {trainer.act}: exit {code} after {time.monotonic() - began:.1f} s")
    return code


def install(folder: Path) -> str:
    """Put this trainer into `folder` under the real one's name; the PATH that finds it first."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / constants.TRAINER_COMMAND
    script.write_text(f"#!{sys.executable}\nimport runpy\nrunpy.run_path({__file__!r}, run_name='__main__')\n")
    script.chmod(0o755)
    python = Path(sys.executable).parent
    return os.pathsep.join([str(folder), str(python), os.environ.get("PATH", os.defpath)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
