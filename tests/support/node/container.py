"""One container as a local process: started, signaled, and reported as the kubelet reports it."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from finetune_api import constants
from support.common.processes import die_with_parent

if TYPE_CHECKING:
    from support.trainer.fork_server import ForkedTrainer, ForkServer

Object = dict[str, Any]

#: In the environment of every process of a pod, so that none of them outlives it.
MARK = "PROCESS_NODE_POD"
_MESSAGE_LIMIT = 4096
_LOG_TAIL_BYTES, _LOG_TAIL_LINES = 2048, 80


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class ContainerProcess:
    """A running container. `reason` may be set before it ends, to report an ending the kernel would give."""

    def __init__(
        self, container: Object, process: "asyncio.subprocess.Process | ForkedTrainer", message_file: Path, log: Path
    ) -> None:
        self.container = container
        self.started_at = now()
        self.reason: str | None = None
        self._process = process
        self._message_file = message_file
        self._log = log

    @classmethod
    async def start(
        cls,
        container: Object,
        command: Sequence[str],
        env: Mapping[str, str],
        working_dir: Path,
        message_file: Path,
        log: Path,
        trainers: "ForkServer | None" = None,
    ) -> "ContainerProcess":
        """Start it, from `trainers` if it is a trainer; FileNotFoundError when the command is not on its PATH."""
        program = shutil.which(command[0], path=env["PATH"])
        if program is None:
            raise FileNotFoundError(f'exec: "{command[0]}": executable file not found in $PATH')
        if trainers and command[0] == constants.TRAINER_COMMAND:
            return cls(container, await trainers.start(command[1:], env, working_dir, log), message_file, log)
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                program,
                *command[1:],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(env),
                cwd=working_dir,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return cls(container, process, message_file, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: int) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def wait(self, seconds: float | None = None) -> bool:
        """Whether it ended within that time."""
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            return False
        return True

    @property
    def exit_code(self) -> int | None:
        """As the kubelet reports it: 128 + the signal's number when a signal ended it."""
        code = self._process.returncode
        return 128 - code if code is not None and code < 0 else code

    def status(self) -> Object:
        """The entry for status.containerStatuses."""
        if self.exit_code is None:
            state: Object = {"running": {"startedAt": self.started_at}}
        else:
            reason = self.reason or ("Completed" if self.exit_code == 0 else "Error")
            ended = {"exitCode": self.exit_code, "reason": reason, "startedAt": self.started_at, "finishedAt": now()}
            state = {"terminated": ended | {"message": self._message()}}
        return container_status(self.container, state, running=self.exit_code is None, container_id=self.pid)

    def _message(self) -> str:
        text = self._message_file.read_bytes()[:_MESSAGE_LIMIT].decode(errors="replace")
        wants_log = self.container.get("terminationMessagePolicy") == "FallbackToLogsOnError"
        if text or not wants_log or self.exit_code == 0:
            return text
        tail = self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        return "\n".join(tail.splitlines()[-_LOG_TAIL_LINES:])


def container_status(
    container: Object, state: Object, running: bool = False, container_id: int | None = None
) -> Object:
    status = {
        "name": container["name"],
        "image": container.get("image", ""),
        "imageID": "",
        "ready": running,
        "started": running,
        "restartCount": 0,
        "state": state,
        "lastState": {},
    }
    return status | ({"containerID": f"process://{container_id}"} if container_id else {})


def kill_all(pod_uid: str) -> None:
    """SIGKILL every process of the pod, also those that left its process group: what tearing down a cgroup does."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == pod_uid:
                process.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue
