"""The image without Kubernetes: its entry command, as the Containerfile has it, does a whole run from a folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api import constants
from support.trainer.process import job

CONTAINERFILE = Path(__file__).resolve().parents[3] / "images" / "trainer" / "Containerfile"


def _final_stage() -> str:
    return CONTAINERFILE.read_text().rpartition("\nFROM ")[2].replace("\\\n", " ")


def _entry_command() -> list[str]:
    [line] = re.findall(r"^ENTRYPOINT (\[.*\])$", _final_stage(), re.MULTILINE)
    return list(json.loads(line))


def _environment() -> dict[str, str]:
    """What the image sets; the programs of its environment are those of this one."""
    pairs = re.findall(r"([A-Z_]+)=(\S+)", " ".join(re.findall(r"^ENV (.*)$", _final_stage(), re.MULTILINE)))
    values = dict(pairs)
    assert values["PATH"] == "/opt/finetune/bin:$PATH"
    return values | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}"}


def _run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """As `docker run --volume folder:/job image …`: the image's environment, and those variables that a user gives."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    given = {constants.ENV_SCRATCH_DIR: str(scratch), constants.ENV_LISTEN: "127.0.0.1:0"}
    given |= {constants.ENV_TERMINATION_LOG: str(scratch / "report.json"), "OMP_NUM_THREADS": "1"}
    command = [*_entry_command(), *arguments]
    return subprocess.run(command, cwd=scratch, env=_environment() | given, capture_output=True, text=True, timeout=300)


def test_the_images_entry_command_trains_from_a_manifest_and_overrides(tiny_model: Path, tmp_path: Path) -> None:
    config = job(tmp_path, tiny_model, {"training.maxSteps": 2, "evaluation.onStart": False})
    done = _run(tmp_path, "--config", str(config), "--set", "training.batchSize=8", "--set", "lora.rank=2")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "scratch" / "report.json").read_text())
    plan = report["executionPlan"]
    assert plan["microBatchSize"] * plan["gradientAccumulationSteps"] == 8
    assert report["stage"] == "Succeeded"
    out = tmp_path / "out"
    assert {"adapter_model.safetensors", "README.md", constants.MANIFEST_FILE} <= {path.name for path in out.iterdir()}
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    _check_with_peft(tiny_model, out)
    assert not list((tmp_path / "scratch").glob("tiny-*")), "the working folder is gone"


def _check_with_peft(model: Path, adapter: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    tokens = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        assert not torch.allclose(base(tokens).logits, tuned(tokens).logits)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--set", "training.batchSize=nine"), 78, "training.batchSize"),
        (("--set", "training.batchsize=8"), 78, "training.batchsize"),
    ],
)
def test_a_wrong_override_is_refused_by_name(
    arguments: tuple[str, ...], code: int, sentence: str, tiny_model: Path, tmp_path: Path
) -> None:
    done = _run(tmp_path, "--config", str(job(tmp_path, tiny_model)), *arguments)
    assert done.returncode == code, done.stderr
    assert sentence in json.loads((tmp_path / "scratch" / "report.json").read_text())["message"]
    assert "Traceback" not in done.stderr


def test_the_command_explains_itself_without_loading_anything(tmp_path: Path) -> None:
    done = _run(tmp_path, "--help")
    assert done.returncode == 0
    assert "--config" in done.stdout and "--set" in done.stdout
