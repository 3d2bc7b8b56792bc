"""`finetune inspect` on a data set and on a manifest: a page, JSON, HTML, and exit codes that tell bad rows."""

import json
from pathlib import Path

import pytest

from support.cli.run import finetune
from support.trainer.process import job
from support.trainer.tiny_model import build_model

GOOD = {"prompt": "anna has", "completion": " tea <b>\x1b[31m"}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    return path


def test_a_data_set_is_shown_with_what_is_learned(rows: Path, tiny_model: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    result = finetune("inspect", str(rows), "--model", str(tiny_model), "--html", str(page))
    assert result.returncode == 0, result.stderr
    assert "train: 1 rows of prompt-completion" in result.stdout
    assert "[<s>]anna has tea <b>[</s>]" in result.stdout
    assert "\x1b" not in result.stdout
    written = page.read_text()
    assert '<span class="learned"> tea &lt;b&gt;</span><span class="learned special">&lt;/s&gt;</span>' in written
    assert "\x1b" not in written
    assert "<b>" not in written


def test_a_manifest_is_inspected_for_programs_and_bad_rows_fail(rows: Path, tiny_model: Path, tmp_path: Path):
    rows.write_text(json.dumps(GOOD) + '\n{"prompt": "x"}\n')
    manifest = job(tmp_path, tiny_model, {"dataset.train": f"file://{rows}", "dataset.eval": None})
    result = finetune("inspect", str(manifest), "-o", "json", "--rows", "0")
    [split] = json.loads(result.stdout)["splits"]
    assert (split["rows"], split["bad"], split["examples"]) == (2, 1, [])
    assert result.returncode == 1
    assert "1 row cannot be used" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rows.jsonl"], "a data set needs --model"),
        (["job.yaml", "--model", "m"], "--model goes with a data set"),
        (["nowhere.jsonl", "--model", "nowhere"], "error: --model: file://{here}/nowhere does not exist\n"),
        (["s3://x", "--model", "m"], 'error: DATASET: Invalid value: "s3://x": must be hf://owner/name'),
        (["rows.jsonl", "--model", "hf://m"], 'error: --model: Invalid value: "hf://m": must be hf://owner/name'),
        (["rows.jsonl", "--model", "m", "--set", "lora.rank=x"], "error: --set: spec.lora.rank: Invalid value"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = finetune("inspect", *arguments)
    assert result.returncode == 1
    assert sentence.format(here=tmp_path) in result.stderr
    assert "Traceback" not in result.stderr
