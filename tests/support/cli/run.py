"""Run `finetune`: in this process for what a command says, as the real executable for how it starts and ends."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest import mock

from finetune_cli.app import main
from finetune_cli.output import console

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
    *arguments: str, stdin: str = "", env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `finetune arguments…` in this process, where nothing has to be imported; `env` is added to its environment.

    The streams are files, as in a pipe. What needs a process (signals, a terminal, children that print) takes
    `finetune_process`.
    """
    code: str | int | None
    with (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as out,
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8") as err,
        io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8") as given,
        mock.patch.dict(os.environ, {**_inherited(), **(env or {})}, clear=True),
        mock.patch.object(sys, "argv", ["finetune", *arguments]),
        mock.patch.object(sys, "stdin", given),
        _fresh_consoles(),
        _same_alarm(),
        chdir(cwd or Path.cwd()),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(["finetune", *arguments], code if isinstance(code, int) else 0, *texts)


@contextmanager
def _fresh_consoles() -> Iterator[None]:
    """The consoles look at the environment once."""
    for each in (console.out, console.err):
        each.cache_clear()
    try:
        yield
    finally:
        for each in (console.out, console.err):
            each.cache_clear()


@contextmanager
def _same_alarm() -> Iterator[None]:
    """Keep pytest-timeout's alarm, which a command that waits for the cluster cancels."""
    before = signal.getitimer(signal.ITIMER_REAL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def finetune_process(
    *arguments: str,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300,
    executable: Path = FINETUNE,
) -> subprocess.CompletedProcess[str]:
    """Run the executable `finetune arguments…` to its end; `env` is added to this process's environment."""
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
