"""Run the trainer's real entry point in a forked process: its own memory, signals and exit code, no new imports.

torch and the libraries on it take seconds to import; a fork of a process that has them starts at once.
"""

import functools
import gc
import importlib
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from finetune_api import constants
from finetune_api.manifest import load_file
from finetune_trainer.publishing.loss_curve import plot_loss
from finetune_trainer.runtime.gc import freeze_imports
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.s3.client import connect
from support.common.processes import die_with_parent
from support.trainer.tiny_model import nli_rows, write_jsonl


def job(folder: Path, model: Path, changes: dict[str, Any] | None = None, *, uid: str | None = None) -> Path:
    """Write data files and a manifest to `folder`: a run of six steps on the CPU. `changes` are by dotted path of spec.

    A value of None removes the field.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train.jsonl").exists():
        write_jsonl(folder / "train.jsonl", nli_rows(40))
        write_jsonl(folder / "eval.jsonl", nli_rows(12, seed=5))
    metadata = {"name": "tiny", "namespace": "team"} | ({"uid": uid} if uid else {})
    spec: dict[str, Any] = {
        "model": {"source": f"file://{model}"},
        "dataset": {"train": f"file://{folder}/train.jsonl", "eval": f"file://{folder}/eval.jsonl"},
        "lora": {"rank": 4, "alpha": 8},
        "training": {"maxSteps": 6, "batchSize": 4, "learningRate": 0.01, "maxLength": 128},
        "evaluation": {"everySteps": 3},
        "checkpoint": {"everySteps": 2},
        "logging": {"everySteps": 1},
        "resources": {"gpusPerNode": 0},
        "output": {"uri": f"file://{folder}/out"},
    }
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        target = spec
        for parent in parents:
            target = target.setdefault(parent, {})
        if value is None:
            target.pop(last, None)
        else:
            target[last] = value
    manifest = {"apiVersion": constants.API_VERSION, "kind": constants.KIND, "metadata": metadata, "spec": spec}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(manifest))
    return path


@dataclass
class Finished:
    """How a trainer process ended."""

    exit_code: int
    report: dict[str, Any]
    log: str

    @property
    def message(self) -> str:
        return str(self.report.get("message", ""))

    @property
    def events(self) -> list[dict[str, Any]]:
        """The log's JSON lines."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]


class TrainerProcess:
    """A running trainer; its files lie in `folder`."""

    def __init__(
        self,
        config: Path,
        folder: Path,
        *,
        env: dict[str, str] | None = None,
        arguments: tuple[str, ...] = (),
        before: Callable[[], None] = lambda: None,
    ) -> None:
        import_everything()

        folder.mkdir(parents=True, exist_ok=True)
        self._termination, self._log = folder / "termination.json", folder / "trainer.log"
        self._termination.unlink(missing_ok=True)
        self._log.unlink(missing_ok=True)
        settings = {
            constants.ENV_SCRATCH_DIR: str(folder / "scratch"),
            constants.ENV_TERMINATION_LOG: str(self._termination),
            constants.ENV_LISTEN: "127.0.0.1:0",
            constants.ENV_SECRETS_DIR: str(folder / "secrets"),
            **(env or {}),
        }
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(settings)
            become_trainer(["--config", str(config), *arguments], self._log, before)

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def send(self, number: signal.Signals) -> None:
        """Nothing happens when it has ended."""
        if not self.has_ended():
            os.kill(self.pid, number)

    def has_ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def wait_for(self, text: str, times: int = 1, timeout: float = 120) -> None:
        """Wait until the log holds `text` so often; an ended process without it is a failure."""
        deadline = time.monotonic() + timeout
        while self.log.count(text) < times:
            ended = self.has_ended()
            assert not ended or self.log.count(text) >= times, f"no {text!r} to the end:\n{self.log[-3000:]}"
            assert time.monotonic() < deadline, f"no {text!r} in time:\n{self.log[-3000:]}"
            time.sleep(0.005)

    def finish(self) -> Finished:
        """Wait for the end. A process that was killed has the negative signal number as exit code."""
        if self._status is None:
            _, self._status = os.waitpid(self.pid, 0)
        report = json.loads(self._termination.read_text()) if self._termination.exists() else {}
        return Finished(os.waitstatus_to_exitcode(self._status), report, self.log)


def become_trainer(argv: list[str], log: Path, before: Callable[[], None] = lambda: None) -> NoReturn:
    """In a fork: run the trainer with its output appended to `log`, and end as it ends."""
    code = 70
    try:
        die_with_parent()
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        import torch

        torch.set_num_threads(1)
        _own_progress_lock()
        _forget_processes()
        _own_compiler_threads()
        before()
        from finetune_trainer.cli import main

        code = main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _own_progress_lock() -> None:
    """tqdm's lock is a semaphore that forks share: one that is killed while it holds it stops all others for good."""
    from tqdm import std

    lock, classes = threading.RLock(), [std.tqdm]
    std.tqdm.set_lock(lock)
    while classes:
        each = classes.pop()
        classes += each.__subclasses__()
        if "_lock" in vars(each):
            each._lock = lock


def _forget_processes() -> None:
    """A trainer in the parent may have told accelerate that it is alone; a fork would believe that of itself."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _own_compiler_threads() -> None:
    """A test that compiled in the parent has started threads, which a fork would wait for and does not have."""
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.pool.cache_clear()


@functools.cache
def import_everything() -> None:
    """What a run imports, once for all forks; none of it is garbage that a fork must look through."""
    gc.collect()
    with freeze_imports():
        for name in ("cli", "steps", "stores.folder", "stores.s3.store"):
            importlib.import_module(f"finetune_trainer.{name}")
        lines = [{"step": step, "loss": 0.1 * step, "evalLoss": 12345.6} for step in (1, 2)]
        plot_loss(lines, io.BytesIO())  # looks for fonts, measures them, and loads what writes a PNG
        connect(Credentials("output", {}))  # reads what botocore knows of S3
        load_file(Path(__file__).parents[3] / "examples/quickstart/finetunejob.yaml")  # compiles the API's patterns


def train(config: Path, folder: Path, **options: Any) -> Finished:
    """Run the trainer to its end."""
    return TrainerProcess(config, folder, **options).finish()


def metrics_lines(out: Path) -> list[dict[str, Any]]:
    """training/metrics.jsonl of a published adapter, without the times."""
    lines = [json.loads(line) for line in (out / constants.METRICS_FILE).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "tokensPerSecond")} for line in lines]
