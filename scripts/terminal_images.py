"""Record docs/images/{quickstart,watch}.svg: terminals that real commands have written to.

    python scripts/terminal_images.py [quickstart] [watch]

The quickstart needs what `make quickstart` prepares. `watch` needs what the tests need: an API server, or its stand-in.
"""

import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
COLUMNS, ROWS = 100, 60
STEP = re.compile(r"\bStep \d+ +loss")
CONTROL = re.compile(r"(\r|\n|\x1b\[[0-9;?]*[A-Za-z])")
FORM = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""Rich's, without fonts that a page would have to fetch from elsewhere."""
sys.path.insert(0, str(ROOT / "tests"))


class Screen:
    """The lines that are on a terminal, colors kept: enough of one for what Rich's progress bars and pages send."""

    def __init__(self) -> None:
        self.lines, self.at, self.fresh = [""], 0, False

    def feed(self, text: str) -> None:
        """Write `text`."""
        for part in CONTROL.split(text):
            if part == "\n":
                self.at += 1
                self.lines += [""] * (self.at + 1 - len(self.lines))
            elif part == "\r":
                self.fresh = True
                continue
            elif part.startswith("\x1b[") and part.endswith("A"):
                self.at = max(0, self.at - int(part[2:-1] or 1))
            elif part == "\x1b[2K" or (self.fresh and part and not part.startswith("\x1b")):
                self.lines[self.at] = "" if part == "\x1b[2K" else part
            elif not part.startswith("\x1b") or part.endswith("m"):
                self.lines[self.at] += part
            self.fresh = False

    def text(self) -> str:
        """Return what is seen, without the empty end."""
        return "\n".join(self.lines).rstrip()


def record(command: list[str], is_enough: Callable[[str], bool] = lambda text: False) -> str:
    """Run `command` on a terminal; what is on it at the end, or once that is enough. Raises SystemExit if it failed."""
    parent, child = pty.openpty()
    ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    env = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=child, stdout=child, stderr=child)
    os.close(child)
    screen = Screen()
    try:
        while data := os.read(parent, 1 << 16):
            screen.feed(data.decode(errors="replace").replace("\r\n", "\n"))
            if is_enough(screen.text()):
                process.terminate()
                break
    except OSError:  # Linux says so once the other end is closed
        if process.wait() != 0:
            raise SystemExit(screen.text()) from None
    process.wait()
    os.close(parent)
    return screen.text()


def draw(name: str, typed: str, seen: str) -> None:
    """Write the terminal after `typed` was entered to docs/images/NAME.svg."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    seen = seen.replace(str(ROOT), "~/finetune-operator")
    for line in Text.from_ansi(f"\x1b[1m$ {typed}\x1b[0m\n{seen}").split(allow_blank=True):
        line.truncate(COLUMNS, overflow="ellipsis")
        console.print(line, soft_wrap=True)
    svg = console.export_svg(title=" ", theme=DIMMED_MONOKAI, code_format=FORM, unique_id=name)
    (IMAGES / f"{name}.svg").write_text(svg)


def quickstart() -> None:
    job = "examples/quickstart/finetunejob.yaml"
    lines = record(["finetune", "run", job]).splitlines()
    steps = [number for number, line in enumerate(lines) if STEP.search(line)]
    lines[steps[4] : steps[-3]] = ["          ⋮"]
    draw("quickstart", f"finetune run {job}", "\n".join(lines))


def watch() -> None:
    from support.docs import dashboards
    from support.node.node import ProcessNode
    from support.operator import process
    from support.server import server as clusters
    from support.server.client import Kube

    with (
        tempfile.TemporaryDirectory() as name,
        clusters.start() as cluster,
        ProcessNode(cluster, "default", Path(name)) as node,
        process.running(cluster.kubeconfig, Path(name), {"namespaces": ["default"]}),
    ):
        kube = Kube(cluster.access, "default")
        dashboards.give_data(node, kube)
        job = dashboards.job("mistral-nli", maxSteps=400, learningRate=0.004)
        job["spec"]["resources"] = {"gpusPerNode": 0}
        kube.create(job)
        os.environ["KUBECONFIG"] = str(cluster.kubeconfig)
        began = time.monotonic()
        halfway = re.compile(r"\b2[0-9]{2} ?/ ?400")
        seen = record(
            ["finetune", "watch", "mistral-nli", "-n", "default"],
            lambda text: bool(halfway.search(text)) or time.monotonic() - began > 300,
        )
    draw("watch", "finetune watch mistral-nli", seen)


def main() -> int:
    known = {"quickstart": quickstart, "watch": watch}
    for name in sys.argv[1:] or known:
        known[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
