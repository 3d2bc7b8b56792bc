"""The process that trains ends with the command that started it, however that ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.server.client import wait_until

#: Says when it is there, and what stopped it.
CHILD = """
import pathlib, signal, sys, time

def told(number, frame):
    pathlib.Path(sys.argv[1], "stopped").touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, told)
pathlib.Path(sys.argv[1], "there").touch()
time.sleep(60)
"""
COMMAND = """
import os, sys
from finetune_cli.local_run import supervise
supervise([sys.executable, "-c", sys.argv[1], sys.argv[2]], os.environ)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child of its parent's end")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_is_killed_takes_its_trainer_along(number: signal.Signals, tmp_path: Path) -> None:
    command = subprocess.Popen([sys.executable, "-c", COMMAND, CHILD, str(tmp_path)])
    wait_until((tmp_path / "there").exists, "the trainer has begun")
    os.kill(command.pid, number)
    wait_until((tmp_path / "stopped").exists, "the trainer was told to stop")
    assert command.wait(timeout=30) == (-number if number == signal.SIGKILL else 0)
