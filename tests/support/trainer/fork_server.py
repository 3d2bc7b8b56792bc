"""Trainers that start at once: a fork of the tests' process, which has imported the trainer's libraries, serves forks.

What a fork gets is what an exec would give it: its own arguments, environment, folder, output and session. One thing it
cannot get is what a library reads from the environment as it is imported; a test that needs this wants a real exec.
"""

import asyncio
import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from support.common.processes import die_with_parent
from support.trainer.process import become_trainer, import_everything


class ForkServer:
    """The server's process, from the thread that made this. `start` may be called on any event loop."""

    def __init__(self, folder: Path) -> None:
        self.address, self._log = str(folder / "fork-server"), folder / "fork-server.log"
        import_everything()
        self._pid = os.fork()
        if self._pid == 0:
            _serve_alone(self.address, self._log)

    def stop(self) -> None:
        os.kill(self._pid, signal.SIGKILL)  # and with it every trainer that it has forked
        os.waitpid(self._pid, 0)

    async def start(self, arguments: Sequence[str], env: Mapping[str, str], folder: Path, log: Path) -> "ForkedTrainer":
        """A new trainer with these arguments; its output is appended to `log`."""
        reader, writer = await self._connect()
        request = {"arguments": list(arguments), "env": dict(env), "folder": str(folder), "log": str(log)}
        writer.write(json.dumps(request).encode() + b"\n")
        return ForkedTrainer(int(await reader.readline()), reader, writer)

    async def _connect(self, seconds: float = 30) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect, once it listens."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return await asyncio.open_unix_connection(self.address)
            except OSError:
                assert time.monotonic() < deadline, f"the fork server does not answer:\n{self._log.read_text()[-3000:]}"
                await asyncio.sleep(0.05)


class ForkedTrainer:
    """As much of asyncio.subprocess.Process as a container needs."""

    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._end = asyncio.create_task(self._wait(reader, writer))

    async def _wait(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        told = await reader.readline()
        writer.close()
        self.returncode = os.waitstatus_to_exitcode(int(told)) if told else -signal.SIGKILL  # with the server
        return self.returncode

    async def wait(self) -> int:
        return await asyncio.shield(self._end)


def _serve_alone(address: str, log: Path) -> NoReturn:
    """In the fork: let go of what is the tests' own, and serve."""
    try:
        os.setsid()
        die_with_parent()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore it
        nowhere = os.open(os.devnull, os.O_RDWR)
        for each in map(int, os.listdir("/dev/fd")):  # noqa: PTH208 -- servers' sockets too
            with contextlib.suppress(OSError):
                os.fstat(each)
                os.dup2(nowhere, each)
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # a fork replaces it, and goes on to write to 2
        _serve(address)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _serve(address: str) -> NoReturn:
    """Fork a trainer for each connection, and tell there its process id and, later, its wait status."""
    selector = selectors.DefaultSelector()
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    selector.register(server, selectors.EVENT_READ)
    selector.register(wake, selectors.EVENT_READ)
    running: dict[int, socket.socket] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is server:
                connection, _ = server.accept()
                request = json.loads(connection.makefile().readline())
                pid = os.fork()
                if pid == 0:
                    _become(request)
                running[pid] = connection
                connection.sendall(f"{pid}\n".encode())
            else:
                os.read(wake, 4096)
                _tell_ends(running)


def _tell_ends(running: dict[int, socket.socket]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with running.pop(pid) as connection, contextlib.suppress(OSError):  # nobody need be listening any more
                connection.sendall(f"{status}\n".encode())


def _become(request: dict[str, object]) -> NoReturn:
    os.setsid()
    die_with_parent()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(str(request["folder"]))
    os.environ.clear()
    os.environ.update(request["env"])  # type: ignore[call-overload]
    become_trainer(list(request["arguments"]), Path(str(request["log"])))  # type: ignore[call-overload]
