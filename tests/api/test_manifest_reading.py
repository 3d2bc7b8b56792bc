"""Reading manifests: lines, overrides, YAML as kubectl reads it, and words for what is wrong."""

from pathlib import Path

import pytest
import yaml

from api.manifests import MINIMAL
from finetune_api.manifest import ManifestError, load_file, load_text, parse

TEXT = """\
# a comment
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata:
  name: nli
spec:
  model: {source: hf://mistralai/Mistral-7B-v0.3}
  dataset:
    train: s3://data/train.jsonl
  output:
    uri: s3://adapters/nli
  training:
    learningRate: 2e-4
"""


def refusal(text: str, **options) -> str:
    with pytest.raises(ManifestError) as error:
        load_text(text, "job.yaml", **options)
    return str(error.value)


def test_numbers_are_read_as_kubectl_reads_them():
    assert load_text(TEXT, "job.yaml").spec.training.learning_rate == 2e-4


def test_a_refusal_names_file_line_and_field():
    assert refusal(TEXT + "    batchSize: -4\n") == (
        "job.yaml:14: spec.training.batchSize: Invalid value: -4: should be greater than or equal to 1"
    )


def test_every_problem_is_told_at_once():
    assert len(refusal(TEXT + "    batchSize: -4\n    seed: x\n    epocs: 2\n").splitlines()) == 3


def test_a_misspelled_field_is_answered_with_the_likely_one():
    assert refusal(TEXT + "    epocs: 2\n").endswith("spec.training.epocs: unknown field; did you mean epochs?")


def test_a_missing_field_is_placed_at_its_parent():
    assert "job.yaml:10: spec.output.uri: Required value" in refusal(
        TEXT.replace("    uri: s3://adapters/nli\n", "    overwrite: true\n")
    )


def test_a_key_given_twice_is_refused():
    assert refusal(TEXT + "    seed: 1\n    seed: 2\n") == "job.yaml:15: spec.training.seed: given twice"


def test_broken_yaml_names_the_line():
    assert refusal(TEXT + "  lora: {rank: 8\n").startswith("job.yaml:15: not YAML: ")


@pytest.mark.parametrize("text", ["", "---\n", "just words\n", "- a\n- b\n"])
def test_text_that_is_no_manifest(text: str):
    assert "FineTuneJob" in refusal(text)


def test_credentials_in_a_uri_are_not_repeated():
    assert "hunter2" not in refusal(TEXT.replace("s3://data/", "s3://key:hunter2@data/"))


def test_overrides_win_over_the_file():
    job = load_text(TEXT, "job.yaml", overrides=["training.learningRate=1e-3", "lora.targetModules=[q_proj]"])
    assert job.spec.training.learning_rate == 1e-3
    assert job.spec.lora.target_modules == ["q_proj"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.learningRate", "is not path=value"),
        ("training.learningRat=1", "--set: spec.training.learningRat: unknown field; did you mean learningRate?"),
        ("training.batchSize=-1", "--set: spec.training.batchSize: Invalid value: -1"),
        ("training.learningRate.x=1", "does not exist"),
        ("=1", "is not path=value"),
    ],
)
def test_a_wrong_override_says_so(override: str, says: str):
    assert says in refusal(TEXT, overrides=[override])


def test_relative_files_start_at_the_manifest(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text(TEXT.replace("s3://data/", "file://./data/"))
    assert load_file(path).spec.dataset.train == f"file://{tmp_path}/data/train.jsonl"


def test_a_file_that_is_missing_or_no_text(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, says in (("missing", "No such file"), ("binary", "not UTF-8"), ("", "directory")):
        with pytest.raises(ManifestError, match=says):
            load_file(tmp_path / name)


def test_a_manifest_survives_the_way_through_the_models():
    job = load_text(yaml.safe_dump(MINIMAL), "job.yaml")
    again = load_text(yaml.safe_dump(job.manifest()), "job.yaml")
    assert again == job
    assert again.spec.training.batch_size == 16


def test_several_documents_keep_their_own_lines():
    first, second = parse(TEXT + "---\n" + TEXT, "job.yaml")
    assert first.lines[("spec",)] == 6
    assert second.lines[("spec",)] == 20
