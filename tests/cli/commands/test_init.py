"""`finetune init` writes a manifest that is valid as it stands."""

from pathlib import Path

import pytest

from finetune_api.manifest import load_file
from support.cli.run import finetune, no_traceback


def init(folder: Path, *arguments: str):
    return no_traceback(finetune("init", *arguments, cwd=folder))


def test_files_of_this_machine_make_a_job_to_run_here(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    result = init(tmp_path, "--model", "owner/name", "--data", "rows.jsonl", "--name", "nli")
    assert result.returncode == 0, result.stderr
    assert "✓ job.yaml written: nli" in result.stdout and "finetune run job.yaml" in result.stdout
    spec = load_file(tmp_path / "job.yaml").spec
    assert (spec.model.source, spec.dataset.train) == ("hf://owner/name", f"file://{tmp_path}/rows.jsonl")
    assert spec.output.uri == f"file://{tmp_path}/nli"
    later = init(tmp_path, "later.yaml", "--model", "owner/name", "--data", "owner/rows")
    assert later.stderr == "owner/rows is not here yet; a data set of the hub is written hf://datasets/owner/name\n"
    assert finetune("validate", "job.yaml", cwd=tmp_path).returncode == 0


def test_uris_make_a_job_to_submit(tmp_path: Path):
    places = ("--data", "s3://data/a.jsonl", "--eval", "s3://data/b.jsonl", "--output", "s3://adapters/{name}")
    result = init(tmp_path, "nli.yaml", "--model", "hf://owner/name", *places)
    assert not result.stderr
    assert "finetune submit nli.yaml --watch" in result.stdout
    spec = load_file(tmp_path / "nli.yaml").spec
    assert (spec.dataset.eval, spec.output.uri) == ("s3://data/b.jsonl", "s3://adapters/my-job")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "x.jsonl"], "--model is missing"),
        (["--model", "owner/name"], "--data is missing"),
        (["--model", "owner/name", "--data", "s3://NO/x"], "spec.dataset.train: Invalid value"),
        (["--model", "owner/name", "--data", "x", "--name", "No Name"], "metadata.name: Invalid value"),
        (["there.yaml", "--model", "owner/name", "--data", "x"], "there.yaml: is already there"),
        (["no/where.yaml", "--model", "owner/name", "--data", "x"], "cannot be written: there is no folder no\n"),
        (
            ["--model", "mistral", "--data", "x"],
            "--model: 'mistral' is neither owner/name of the hub nor a folder here",
        ),
    ],
)
def test_what_is_refused_writes_nothing(tmp_path: Path, arguments: list[str], said: str):
    (tmp_path / "there.yaml").write_text("mine")
    result = init(tmp_path, *arguments)
    assert (result.returncode, said in result.stderr) == (1, True), result.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
