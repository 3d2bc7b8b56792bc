"""An adapter that continues another one names it, and the command follows the chain as long as it is whole."""

import hashlib
import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest

from support.cli.run import finetune, no_traceback
from support.trainer.process import job, train
from support.trainer.tiny_model import nli_rows, write_jsonl


@pytest.fixture(scope="module")
def chain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters, first/out and second/out; the second continues the first, on other rows."""
    folder = tmp_path_factory.mktemp("chain")
    first = train(job(folder / "first", tiny_model, {"training.maxSteps": 2}), folder / "one")
    (folder / "second").mkdir()
    write_jsonl(folder / "second/train.jsonl", nli_rows(20, seed=3))
    shutil.copy(folder / "first/eval.jsonl", folder / "second")
    changes = {"training.maxSteps": 2, "lora.initFrom": f"file://{folder}/first/out"}
    second = train(job(folder / "second", tiny_model, changes), folder / "two")
    assert (first.exit_code, second.exit_code) == (0, 0), second.log
    return folder


def digest(manifest: Path) -> str:
    return f"sha256:{hashlib.sha256(manifest.read_bytes()).hexdigest()}"


def test_a_manifest_and_a_card_say_what_the_adapter_was_made_of(chain: Path) -> None:
    first, second = (json.loads((chain / name / "out/manifest.json").read_text()) for name in ("first", "second"))
    made = second["lineage"]
    assert made["codeVersion"] == metadata.version("finetune-operator")
    assert made["parent"] == {
        "uri": f"file://{chain}/first/out",
        "manifestDigest": digest(chain / "first/out/manifest.json"),
    }
    assert made["evalRows"] == first["lineage"]["evalRows"]
    assert made["trainRows"] != first["lineage"]["trainRows"]
    assert "parent" not in first["lineage"]
    card = (chain / "second/out/README.md").read_text()
    assert f"- training rows: `{made['trainRows']}`" in card
    assert f"- continues: `file://{chain}/first/out ({made['parent']['manifestDigest']})`" in card


def test_the_command_prints_the_chain(chain: Path) -> None:
    page = no_traceback(finetune("lineage", f"file://{chain}/second/out"))
    assert page.returncode == 0, page.stderr
    assert f"continues file://{chain}/first/out" in page.stdout
    found = json.loads(finetune("lineage", str(chain / "second/out"), "-o", "json").stdout)
    assert [each["manifestDigest"] for each in found] == [
        digest(chain / name / "out/manifest.json") for name in ("second", "first")
    ]
    job_file = hashlib.sha256((chain / "second/out/training/job.yaml").read_bytes()).hexdigest()
    assert found[0]["specDigest"] == f"sha256:{job_file}"
    assert found[0]["job"] == "team/tiny"
    assert found[0]["metrics"]["evalLoss"] > 0


def test_a_parent_that_was_replaced_or_is_gone_is_told(chain: Path, tmp_path: Path) -> None:
    manifest = chain / "first/out/manifest.json"
    kept = manifest.read_bytes()
    try:
        manifest.write_text(json.dumps(json.loads(kept) | {"step": 99}))
        replaced = no_traceback(finetune("lineage", str(chain / "second/out")))
        manifest.unlink()
        gone = no_traceback(finetune("lineage", str(chain / "second/out")))
    finally:
        manifest.write_bytes(kept)
    assert replaced.returncode == 5
    assert (
        f"file://{chain}/first/out is not what file://{chain}/second/out continues: it was sha256:" in replaced.stderr
    )
    assert gone.returncode == 1
    assert f"continues file://{chain}/first/out: no complete adapter at" in gone.stderr
    assert f"file://{chain}/second/out" in gone.stdout
