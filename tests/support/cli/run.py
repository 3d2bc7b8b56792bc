"""Run the real `finetune` executable, as a shell would."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

FINETUNE = Path(sys.executable).with_name("finetune")

MANIFEST = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata:
  name: nli
spec:
  model:
    source: hf://mistralai/Mistral-7B-v0.3
  dataset:
    train: s3://data/nli/train.jsonl
  output:
    uri: s3://adapters/nli
"""


def finetune(
    *arguments: str,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300,
    executable: Path = FINETUNE,
) -> subprocess.CompletedProcess[str]:
    """Run `finetune arguments…` to its end; `env` is added to this process's environment."""
    return subprocess.run(
        [str(executable), *arguments],
        input=stdin,
        env={**_inherited(), **(env or {})},
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def _inherited() -> dict[str, str]:
    """This process's environment, without what test runners say about terminals."""
    return {
        key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR")
    }


def no_traceback(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Assert that a command ended without a Python traceback; returns its result."""
    assert "Traceback" not in result.stdout + result.stderr, result.stderr
    return result


def _as_a_shell_would(terminal: int) -> None:
    """In the child: the terminal is its own, and Ctrl-C works, though the tests may run in the background."""
    os.login_tty(terminal)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def on_a_terminal(
    arguments: Sequence[str], env: Mapping[str, str], cwd: Path
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process whose terminal is the pty whose master is yielded, in the foreground as under a shell."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [str(FINETUNE), *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=env,
        cwd=cwd,
        preexec_fn=lambda: _as_a_shell_would(slave),
    )
    os.close(slave)
    try:
        yield process, master
    finally:
        process.kill()
        process.wait()
        os.close(master)


def read_until(master: int, words: str, seconds: float = 120) -> str:
    """What the terminal shows until `words` are there, its end, or the time is up."""
    seen = b""
    deadline = time.monotonic() + seconds
    with suppress(OSError):
        while words.encode() not in seen and (left := deadline - time.monotonic()) > 0:
            if select.select([master], [], [], left)[0]:
                seen += os.read(master, 65536)
    return seen.decode(errors="replace")
