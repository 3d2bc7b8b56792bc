"""Whether the output can be written, and whether the adapter is there already, is known before torch is imported."""

import subprocess
import sys
from pathlib import Path

from support.trainer.process import job

_SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft", "numpy"):
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, Blocked())
from pathlib import Path
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.settings import Environment, Ranks, load

settings = load(Path(sys.argv[1]), [], Environment.from_env(), Ranks())
print(AdapterOutput.open(settings).find_published())
"""


def test_the_output_is_checked_without_torch(tmp_path: Path) -> None:
    manifest = job(tmp_path, tmp_path / "no-model")
    done = subprocess.run([sys.executable, "-c", _SCRIPT, manifest], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
