"""Reading manifests: lines, overrides, YAML as kubectl reads it, and words for what is wrong."""

import textwrap
from pathlib import Path

import pytest
import yaml

from api.manifests import MINIMAL
from finetune_api.exit_codes import ExitCode
from finetune_api.manifest import ManifestError, check, load_file, load_text, parse
from finetune_trainer.errors import failure_of

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


def test_a_manifest_that_ends_too_early_names_the_column():
    with pytest.raises(
        ManifestError, match=r"job\.json:1: not YAML: .* lacks its } at the end of the file \(column 14"
    ):
        load_text('{"spec": {"a"', "job.json")


def test_broken_yaml_names_the_line():
    assert refusal(TEXT + "  lora: {rank: 8\n").startswith("job.yaml:15: not YAML: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TEXT + "  image: a\0b\n", "job.yaml:14: not YAML: no text may hold the character U+0000"),
        (TEXT + "  image: \x1b[31m\n", "job.yaml:14: not YAML: no text may hold the character U+001B"),
        (
            TEXT.replace("name: nli", "name: {{ .Values.name }}"),
            "job.yaml:5: metadata.name: a key must be plain text; is this a template that was not rendered?",
        ),
        (TEXT + "  ? [a, b]\n  : c\n", "job.yaml:14: spec: a key must be plain text; is this"),
        (TEXT + '  "\\e[31m": c\n', "job.yaml:14: spec: a key must be plain text"),
        ("[" * 3000, "job.yaml: is nested too deeply"),
        ("a: !!int abc\n", "job.yaml: not YAML: a value is not what its tag says"),
        ("a: !!int ''\n", "job.yaml: not YAML: a value is not what its tag says"),
        ("a: !!float _\n", "job.yaml: not YAML: a value is not what its tag says"),
        ("a: 0x" + "f" * 5000, "job.yaml: not YAML: a value is not what its tag says"),
        ("a: " + "1" * 5000, "job.yaml: not YAML: a value is not what its tag says"),
        (TEXT + '  image: "\\ud800"\n', 'job.yaml:14: spec.image: Invalid value: "\\ud800"'),
    ],
    ids=[
        "NUL",
        "escape",
        "template",
        "list as key",
        "escape in a key",
        "deep",
        "wrong tag",
        "empty integer",
        "no digit",
        "endless in hexadecimal",
        "endless",
        "surrogate",
    ],
)
def test_text_that_no_reader_takes_is_refused_in_a_sentence(text: str, says: str):
    with pytest.raises(ManifestError) as error:
        load_text(text, "job.yaml")
    message = str(error.value)
    assert message.startswith(says)
    assert message.isprintable()
    assert failure_of(error.value).exit_code == ExitCode.CONFIG_INVALID, "the trainer's pod would be tried again"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('a: "b\nc: d\n', "1: not YAML: a quote opens here and is never closed (column 4)"),
        ("a:\n\tb: c\n", "2: not YAML: a tab stands here, and YAML indents with spaces (column 1)"),
        ("a: b: c\n", "1: not YAML: a colon where none can be"),
        ("a:\n    b: 2\n  c: 3\n", "3: not YAML: the line is indented as no line above it"),
        ("- a\nb: c\n", "2: not YAML: list items (- …) and keys are mixed"),
        ("a: 1\nb\nc: 2\n", "2: not YAML: a key without a value: write key: value"),
        ("a: {b: 1\nc: 3\n", "2: not YAML: a comma or } is missing: the bracket opens in line 1"),
        ("a: *.jsonl\n", "1: not YAML: a value that begins with * or & must stand in quotes"),
        ("a: %x\n", "1: not YAML: a value that begins with % must stand in quotes"),
        ("a: - b\n", "1: not YAML: a list begins on a line of its own"),
        ("[a]\na: b\n", "2: not YAML: a new document begins here without ---"),
        ('a: "\\d"\n', "1: not YAML: in double quotes, \\ begins an escape: use single quotes"),
        ("a: *b\n", "1: not YAML: found undefined alias 'b' (column 4)"),
    ],
)
def test_text_that_is_not_yaml_is_told_what_the_mistake_is(text: str, says: str):
    assert refusal(text).startswith(f"job.yaml:{says}")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("learningRate: 1e-4", 1e-4),
        ("learningRate: .5", 0.5),
        ("epochs: 1e2", 100),
        ("batchSize: 32.0", 32),
        ("batchSize: 3.2e1", 32),
        ("microBatchSize: 4.0", 4),
        ("seed: 0x10", 16),
        ("seed: 0o20", 16),
        ("seed:", 42),
    ],
)
def test_a_number_is_what_kubectl_sends_for_it(written: str, read: float):
    """Each was tried with `kubectl apply --dry-run=server` 1.32."""
    training = load_text(TEXT.replace("learningRate: 2e-4", written), "job.yaml").spec.training
    found = training.manifest()[written.partition(":")[0]]
    assert found == read


def test_what_is_no_number_to_kubectl_is_none_here():
    for written in ("1:30", ".inf", "1e999"):
        message = refusal(TEXT + f"    weightDecay: {written}\n")
        assert 'Invalid value: "string": must be of type number: "' in message, written
    assert load_text(TEXT + "  resources: {cpu: 2.0, nodeSelector: {1: a}}\n", "").spec.resources.cpu == 2


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("1.5", "put 1.5 in quotes"),
        ("16GB", "16GB is written 16G or 16Gi"),
        ("16 GiB", "16 GiB is written 16G or 16Gi"),
        ("500mb", "500mb is written 500M or 500Mi"),
        ("64K", "64K is written 64k or 64Ki"),
    ],
)
def test_a_quantity_that_is_nearly_one_is_answered_with_the_right_one(value: str, hint: str):
    message = refusal(TEXT + f"  resources:\n    memory: {value}\n")
    assert message.endswith(f'must be a quantity such as 4, "1.5", 500m, 16G or 16Gi: {hint}')
    assert message.startswith("job.yaml:15: spec.resources.memory: ")


def test_a_list_is_what_it_lists():
    """As `kubectl get -o yaml` prints several; lines are those of the file."""
    items = textwrap.indent(TEXT.partition("\n")[2], "  ").replace("  apiVersion", "- apiVersion", 1)
    text = "apiVersion: v1\nkind: List\nitems:\n" + items + items.replace("2e-4", "7")
    first, second = parse(text, "job.yaml")
    assert check(first).metadata.name == "nli"
    with pytest.raises(ManifestError) as error:
        check(second)
    line = len(text.splitlines())
    assert str(error.value).startswith(f"job.yaml:{line}: spec.training.learningRate: Invalid value: 7")


@pytest.mark.parametrize("text", ["", "---\n", "just words\n", "- a\n- b\n"])
def test_text_that_is_no_manifest(text: str):
    assert "FineTuneJob" in refusal(text)


@pytest.mark.parametrize(
    "address",
    ["s3://key:hunter2@data/", "s3://key:a/hunter2@data/", "S3://key:hunter2@data/", "s3+https://key:hunter2@data/"],
)
def test_credentials_in_a_uri_are_not_repeated(address: str):
    message = refusal(TEXT.replace("s3://data/", address))
    assert "hunter2" not in message
    assert 'Invalid value: "…@data/train.jsonl": must not hold credentials' in message


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
    for name, says in (("missing", "No such file"), ("binary", "UTF-16 text: save it as UTF-8"), ("", "directory")):
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


def test_a_list_of_very_many_objects_is_read_once():
    """Each object was given its lines by going through all of them."""
    items = "\n".join("- {kind: FineTuneJob, metadata: {name: x}}" for _ in range(8_000))
    found = parse(f"kind: List\nitems:\n{items}\n", "job.yaml")
    assert (len(found), found[-1].place(("metadata", "name"))) == (8_000, ("job.yaml", 8_002))
