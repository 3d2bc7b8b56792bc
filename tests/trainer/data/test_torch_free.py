"""Bad input is refused before torch is imported: reading and checking rows, stores and planning do without it."""

import json
import subprocess
import sys
from pathlib import Path

from support.trainer.process import job

_SCRIPT = """
import importlib, json, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft", "numpy"):
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, Blocked())
import finetune_trainer.planning, finetune_trainer.stores

for package in (finetune_trainer.planning, finetune_trainer.stores):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)

from pathlib import Path
import finetune_trainer.data.dataset
from finetune_trainer.data.row_files import read_rows
from finetune_trainer.errors import DatasetInvalid
from finetune_trainer.inputs import fetch_data_files
from finetune_trainer.settings import Environment, Ranks, load

settings = load(Path(sys.argv[1]), [], Environment.from_env(), Ranks())
files = fetch_data_files(settings)
rows = read_rows(*files, settings.spec.dataset)
found = [rows.train.format.name, len(rows.train), len(rows.eval)]
files[0][0].path.write_text('{"text": 7}')
try:
    read_rows(*files, settings.spec.dataset)
except DatasetInvalid as error:
    found.append(str(error))
print(json.dumps(found))
"""


def test_rows_are_read_and_refused_without_torch(tmp_path: Path) -> None:
    manifest = job(tmp_path, tmp_path / "no-model")
    done = subprocess.run([sys.executable, "-c", _SCRIPT, manifest], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        "text",
        40,
        12,
        "spec.dataset.train: train.jsonl:1: 'text' must be a string, not int",
    ]
