"""Child processes that never outlive their parent, free ports, and waiting for a server."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import requests

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """In the child, before exec: ask the kernel to kill it when the thread that started it ends (Linux only)."""
    if hasattr(_libc, "prctl"):
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A TCP port nobody listens on now, below those that outgoing connections take while a server still starts."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port := random.randrange(10_000, 32_000)))
            return port


class Process:
    """A server process with its output in a file; start it in the thread that outlives it."""

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.command = [str(part) for part in command]
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env) if env is not None else None,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def stop(self, seconds: float = 10) -> int:
        """SIGTERM, then SIGKILL after `seconds`; the exit code."""
        self.signal(signal.SIGTERM)
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """SIGKILL; the exit code."""
        self.signal(signal.SIGKILL)
        return self._popen.wait()

    def wait_for_url(
        self, url: str, seconds: float = 60, token: str | None = None, ca_file: Path | None = None
    ) -> None:
        """Until `url` answers 200; AssertionError with the process's last lines when it ends or takes longer."""
        session = requests.Session()
        session.trust_env = False
        session.headers.update({"Authorization": f"Bearer {token}"} if token else {})
        deadline = time.monotonic() + seconds
        last: object = None
        while time.monotonic() < deadline:
            if self.returncode is not None:
                raise AssertionError(f"{self.command[0]} ended with {self.returncode}:\n{self.output()[-3000:]}")
            try:
                last = session.get(url, timeout=5, verify=str(ca_file) if ca_file else True).status_code
                if last == 200:
                    return
            except OSError as error:  # refused, reset, or the CA file is not written yet
                last = error
            time.sleep(0.05)
        raise AssertionError(f"{url} did not answer within {seconds:g} s ({last}):\n{self.output()[-3000:]}")
