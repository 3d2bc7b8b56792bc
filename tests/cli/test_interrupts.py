"""A Ctrl-C that Python drops is raised again."""

import subprocess
import sys

#: Its finalizer is where the signal arrives: whatever is raised there, Python drops.
PROGRAM = """
import os, signal, sys, time
from finetune_cli.interrupts import insistent_interrupts

signal.signal(signal.SIGINT, getattr(signal, sys.argv[1]))

class Closing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass

try:
    with insistent_interrupts():
        Closing()
        print("dropped", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
print(signal.getsignal(signal.SIGINT) is getattr(signal, sys.argv[1]), signal.getitimer(signal.ITIMER_REAL))
"""


def outcome(disposition, seconds):
    """Lines printed where SIGINT had that disposition, and the block lasts so long."""
    program = PROGRAM.replace("60", str(seconds))
    command = [sys.executable, "-c", program, disposition]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    return result.stdout.splitlines()


def test_an_interrupt_dropped_by_a_finalizer_comes_back():
    assert outcome("default_int_handler", 60) == ["dropped", "interrupted", "True (0.0, 0.0)"]


def test_where_interrupts_are_ignored_they_stay_ignored():
    assert outcome("SIG_IGN", 1) == ["dropped", "True (0.0, 0.0)"]
