"""`finetune run` with the real trainer on a tiny model: what it says, passes on, and leaves behind."""

import os
import re
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

from support.cli.run import (
    FINETUNE,
    MANIFEST,
    finetune,
    finetune_process,
    no_traceback,
    on_a_terminal,
    read_until,
)
from support.server.client import wait_until
from support.trainer.tiny_model import build_model, nli_rows, write_jsonl

pytestmark = pytest.mark.scenario
ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model and its data."""
    folder = tmp_path_factory.mktemp("inputs")
    build_model(folder / "model")
    write_jsonl(folder / "train.jsonl", nli_rows(64))
    write_jsonl(folder / "eval.jsonl", nli_rows(8, seed=1))
    return folder


@pytest.fixture
def job(inputs, tmp_path):
    """A manifest of four steps on the CPU, with addresses relative to itself."""
    for name in ("model", "train.jsonl", "eval.jsonl"):
        (tmp_path / name).symlink_to(inputs / name)
    spec = {
        "model": {"source": "file://./model"},
        "dataset": {"train": "file://./train.jsonl", "eval": "file://./eval.jsonl"},
        "training": {"maxSteps": 4, "batchSize": 4, "maxLength": 128, "learningRate": 1e-3},
        "logging": {"everySteps": 1},
        "resources": {"gpusPerNode": 0},
        "output": {"uri": "file://./out"},
    }
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tiny"}, "spec": spec}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


@pytest.fixture
def run(tmp_path):
    """Run `finetune run` with a cache and a temporary folder of the test's own."""
    env = ENV | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()

    def call(*arguments, stdin=""):
        return no_traceback(finetune_process("run", *arguments, env=env, stdin=stdin, cwd=tmp_path))

    call.env = {**os.environ, **env}
    return call


def test_the_trainers_failure_and_its_cure_are_shown_with_its_exit_code(run, job, tmp_path):
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    result = run("job.yaml")
    assert result.returncode == 65
    last = result.stderr.splitlines()[-2:]
    assert last[0].startswith("error: tiny: DatasetInvalid after ")
    assert "train.jsonl" in last[0]
    assert last[1] == "hint:  Fix the file and line the message names, and run it again."
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_goes_on_to_an_adapter(run, job, tmp_path):
    """The trainer takes a second Ctrl-C for impatience: one press has to reach it exactly once."""
    more = ("--set", "training.maxSteps=100", "--set", "lora.rank=8")
    with on_a_terminal(("run", "job.yaml", *more), run.env | {"TERM": "xterm"}, tmp_path) as (process, master):
        before = read_until(master, "Step 5")
        assert "Step 5" in before, before
        os.write(master, b"\x03")
        rest = read_until(master, "resumes from the checkpoint")
        assert process.wait(120) == 75, rest
    assert "tiny: Preempted" in rest
    assert "Run the same command again: it resumes from the last checkpoint, if one was saved." in rest
    assert list((tmp_path / "out" / "checkpoints").iterdir())
    assert not (tmp_path / "out" / "manifest.json").exists()

    again = run("job.yaml", *more)
    assert again.returncode == 0, again.stderr
    assert "Resuming from the checkpoint at step" in again.stderr
    assert_summary(again.stdout, tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []


def assert_summary(shown, folder):
    assert "✓ tiny is trained" in shown
    assert re.search(rf"Adapter +{folder}/out\n", shown)
    assert re.search(r"Held-out loss +[0-9.]{6} → [0-9.]{6}", shown)
    assert re.search(r"Training +100 steps, [0-9,.]+ tokens/s", shown)
    assert "finetune submit job.yaml   # with hf://, s3:// or pvc:// for file://" in shown
    lines = shown.partition("Use it in Python:\n")[2].partition("\n\n")[0].splitlines()
    assert len(lines) == 5
    here = {}
    exec(textwrap.dedent("\n".join(lines)), here)
    assert here["model"].peft_config["default"].r == 8
    assert type(here["model"]).__name__ == "PeftModelForCausalLM"
    assert len(here["tokenizer"]) > 0


def test_a_signal_to_the_command_reaches_the_trainer_of_a_manifest_from_stdin(run, job, tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as output, job.open() as manifest:
        process = subprocess.Popen(
            [str(FINETUNE), "run", "-", "--set", "training.maxSteps=100000"],
            stdin=manifest,
            stdout=output,
            stderr=output,
            env=run.env,
            cwd=tmp_path,
            start_new_session=True,
        )
    try:
        wait_until(lambda: "Step 3" in log.read_text(), "training has begun", 120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "tiny: Preempted" in log.read_text()
    assert list(Path(run.env["TMPDIR"]).iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "lora.rank=-1"], "--set: spec.lora.rank: Invalid value: -1"),
        (["--set", "resources.nodes=2"], "spec.resources.nodes is 2, and this is one machine"),
        (
            ["--set", "resources.gpusPerNode=64", "--set", "training.batchSize=64"],
            "gpusPerNode is 64, and this machine has",
        ),
        (
            ["--set", "resources.gpusPerNode=0", "--set", "dataset.train=pvc://claim/a"],
            "spec.dataset.train is pvc://claim/a, a volume of a cluster",
        ),
    ],
)
def test_what_cannot_run_here_is_refused_before_anything_starts(run, tmp_path, arguments, sentence):
    (tmp_path / "job.yaml").write_text(MANIFEST)
    result = run("job.yaml", *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert sentence in result.stderr
    assert not (tmp_path / "cache").exists()


def test_a_machine_without_a_gpu_says_so_before_anything_is_imported(tmp_path, monkeypatch):
    from finetune_cli import local_run

    monkeypatch.setattr(local_run, "gpus_here", lambda: 0)
    (tmp_path / "job.yaml").write_text(MANIFEST)
    result = no_traceback(finetune("run", "job.yaml", cwd=tmp_path))
    assert result.returncode == 1
    assert "spec.resources.gpusPerNode is 1, and this machine has no GPU" in result.stderr
    assert "--set resources.gpusPerNode=0 (0 is the CPU)" in result.stderr
