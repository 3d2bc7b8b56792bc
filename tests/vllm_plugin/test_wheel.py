"""The plugin's wheel, built and unpacked: vLLM finds what it installs by its entry point."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: What vLLM does at its start (vllm/plugins/__init__.py, load_plugins_by_group), and where it found the code.
FIND = """
import json
from importlib.metadata import entry_points
found = [each for each in entry_points(group="vllm.general_plugins") if each.name == "finetune"]
functions = [each.load() for each in found]
print(json.dumps([[each.dist.name, each.dist.version] for each in found] + [f.__code__.co_filename for f in functions]))
functions[0]()
"""


def test_the_entry_point_is_found_from_the_installed_wheel(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="builds the wheel: pip install hatchling")
    shutil.copytree(ROOT / "vllm-plugin", tmp_path / "source")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "installed")
    rooms = [tmp_path / "installed", *(ROOT / room for room in ("crds", "cli", "trainer"))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, rooms)), "FINETUNE_ADAPTERS": ""}
    done = subprocess.run(
        [sys.executable, "-c", FIND], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert json.loads(done.stdout) == [["finetune-vllm", version], f"{tmp_path}/installed/finetune_vllm/plugin.py"]


def test_the_distribution_names_the_entry_point_that_vllm_loads() -> None:
    project = tomllib.loads((ROOT / "vllm-plugin/pyproject.toml").read_text())["project"]
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["vllm.general_plugins"]["finetune"]
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert project["version"] == root["version"]
    assert project["dependencies"] == [f"{root['name']}[cli]=={root['version']}"]
