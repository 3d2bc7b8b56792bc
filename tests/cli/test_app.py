"""The command line as a whole: help that teaches, a light start, exit codes that scripts can trust."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import finetune_api
import finetune_cli
import finetune_trainer
from support.cli.run import (
    FINETUNE,
    MANIFEST,
    finetune,
    finetune_process,
    no_traceback,
)

COMMANDS = (
    *("validate", "plan", "run"),
    *("submit", "list", "status", "watch", "logs", "suspend", "resume", "delete"),
    *("download", "chat", "export", "lineage", "promote", "rollback", "serve-manifest"),
)
#: What training needs, and the command line must not.
TRAINING = ("torch", "transformers", "peft", "datasets", "numpy", "trl", "accelerate", "bitsandbytes")
HEAVY = ("torch", "transformers", "kopf", "kubernetes", "aiohttp", "boto3", "pydantic", "yaml", "finetune_trainer")

#: What `pip install finetune-operator` brings without any extra.
BASE_PACKAGES = (
    "annotated_doc",
    "annotated_types",
    "markdown_it",
    "mdurl",
    "pydantic",
    "pydantic_core",
    "pygments",
    "rich",
    "shellingham",
    "structlog",
    "typer",
    "typing_extensions.py",
    "typing_inspection",
    "yaml",
    "_yaml",
)


@pytest.fixture
def bare(tmp_path):
    """A Python that sees the base dependencies alone: no trainer, no Kubernetes client."""
    site = tmp_path / "site"
    site.mkdir()
    installed = Path(importlib.metadata.distribution("typer").locate_file(""))
    for name in BASE_PACKAGES:
        (site / name).symlink_to(installed / name)
    path = [site, *(Path(package.__path__[0]).parent for package in (finetune_api, finetune_cli, finetune_trainer))]

    def run(*arguments):
        code = "import sys; from finetune_cli.app import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, "-S", "-c", code, *arguments],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": ":".join(map(str, path))},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def light(tmp_path):
    """A Python in which nothing that trains can be imported."""
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {TRAINING!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.partition(".")[0] in {TRAINING!r} else found(name, *more)
from finetune_cli.app import main
sys.exit(main())
"""

    def run(*arguments, env):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(
            command, env={**os.environ, **env}, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return run


def test_help_lists_the_commands_and_the_exit_codes():
    result = finetune_process("--help")
    assert result.returncode == 0
    for word in (*COMMANDS, "First steps:", "Exit codes:", "130"):
        assert word in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_shows_how_it_is_used_and_examples(command):
    result = finetune(command, "--help")
    assert result.returncode == 0
    assert f"Usage: finetune {command}" in result.stdout
    assert f"  finetune {command} " in result.stdout.partition("Examples:")[2]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_prose_of_help_fits_the_terminal(columns):
    result = finetune("run", "--help", env={"COLUMNS": columns})
    # Examples are never broken, so that they can be copied.
    prose, _, rest = result.stdout.partition("Examples:")
    for line in [*prose.splitlines(), *rest.partition("Arguments:")[2].splitlines()]:
        assert len(line) <= int(columns)


def test_help_needs_nothing_heavy():
    code = f"""
import sys
sys.argv = ["finetune", "--help"]
from finetune_cli.app import main
assert main() == 0
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_version():
    result = finetune_process("--version")
    assert result.stdout == f"finetune {importlib.metadata.version('finetune-operator')}\n"
    assert finetune("version").stdout == result.stdout


def test_it_is_also_the_kubectl_plugin():
    result = finetune_process("validate", "--help", executable=FINETUNE.with_name("kubectl-finetune"))
    assert "Usage: kubectl finetune validate FILE..." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rnu"], "No such command 'rnu'. Did you mean 'run'?"),
        (["run"], "Missing argument 'FILE'."),
        (["run", "x.yaml", "--zzz"], "No such option: --zzz"),
        (["plan", "x.yaml", "--rwos", "3"], "No such option: --rwos (Possible options: --rows)"),
        (["plan", "x.yaml", "y.yaml"], "too many arguments: y.yaml"),
        (["plan", "x.yaml", "--rows", "many"], "Invalid value for '--rows': 'many' is no whole number"),
        (["plan", "x.yaml", "--rows", "0"], "Invalid value for '--rows': '0' must be at least 1"),
        (["plan", "x.yaml", "--trial-hours", "1h"], "Invalid value for '--trial-hours': '1h' is no number"),
        (
            ["export", "a", "b", "--to", "mergd"],
            "Invalid value for '--to': 'mergd' is not one of 'merged', 'gguf', 'oci', 'hf'; did you mean 'merged'?",
        ),
    ],
)
def test_a_wrong_call_is_a_sentence_and_exit_code_1(arguments, sentence):
    result = no_traceback(finetune(*arguments))
    assert (result.returncode, result.stdout) == (1, "")
    assert f"error: {sentence}\nhint:  finetune" in result.stderr
    assert "--help" in result.stderr


def test_a_wrong_option_names_the_help_of_its_command():
    said = finetune("plan", "job.yaml", "--set").stderr
    assert said == "error: Option '--set' requires an argument.\nhint:  finetune plan --help\n"


def test_a_reader_that_stops_reading_is_no_error(tmp_path):
    command = f"{FINETUNE} --help | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "0"
    assert result.stderr == ""


def test_colors_and_boxes_stay_out_of_pipes():
    assert "\x1b" not in finetune("--help").stdout
    assert "\x1b" in finetune("--help", env={"FORCE_COLOR": "1", "TERM": "xterm-256color"}).stdout


def test_the_shell_completes_commands_and_options():
    script = f"PATH={FINETUNE.parent}:$PATH; source <(finetune --show-completion); complete -p finetune"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout == "complete -o default -F _finetune_completion finetune\n", result.stderr
    for words, answer in (("finetune val", "validate"), ("finetune run --se", "--set")):
        asked = {"_FINETUNE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        assert finetune_process(env=asked).stdout.split() == [answer]


def test_the_base_installation_validates(bare, tmp_path):
    (tmp_path / "job.yaml").write_text(MANIFEST)
    result = bare("validate", "job.yaml")
    assert (result.returncode, result.stdout) == (0, "✓ 1 FineTuneJob valid: nli\n"), result.stderr


def test_commands_that_need_more_say_what_to_install(bare, tmp_path):
    for arguments in (("list",), ("download", "s3://bucket/adapter", "out")):
        result = no_traceback(bare(*arguments))
        assert result.returncode == 1
        assert "is not installed here\nhint:  in a clone of its repository: pip install '.[cli]'" in result.stderr


def test_nothing_that_trains_is_needed_to_plan_and_to_download(light, hub, s3, bucket, tmp_path):
    (tmp_path / "job.yaml").write_text(MANIFEST)
    planned = light("plan", "job.yaml", env={"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ""})
    assert (planned.returncode, "at the peak" in planned.stdout) == (0, True), planned
    (tmp_path / "weights").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    files = [{"path": "weights", "sizeBytes": 7, "sha256": digest}]
    manifest = {"kind": "Adapter", "createdAt": "2026-01-01T00:00:00Z", "files": files}
    for name, body in (("weights", b"weights"), ("manifest.json", json.dumps(manifest).encode())):
        s3.client().put_object(Bucket=bucket, Key=f"nli/{name}", Body=body)
    downloaded = light("download", f"s3://{bucket}/nli", "out", env=s3.env)
    assert (downloaded.returncode, "all checksums verified" in downloaded.stdout) == (0, True), downloaded


def test_running_without_the_trainer_says_what_to_install(bare, tmp_path):
    (tmp_path / "job.yaml").write_text(MANIFEST)
    result = no_traceback(bare("run", "job.yaml"))
    assert result.returncode == 1
    assert "the trainer is not installed here (torch, transformers, trl, peft, bitsandbytes missing)" in result.stderr
    assert "pip install '.[trainer]'" in result.stderr
