"""`finetune validate` says what is wrong, where, and what is allowed."""

import pytest

from support.cli import MANIFEST, finetune, no_traceback

#: Each line holds the one before ten times: a gigabyte of nothing, were it written out.
LAUGHS = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join(['*a' + str(n - 1)] * 10)}]" for n in range(1, 10))]
SECRET = "apiVersion: v1\nkind: Secret\nmetadata:\n  name: s3\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "good.yaml").write_text(MANIFEST)
    (tmp_path / "rank.yaml").write_text(MANIFEST + "  lora:\n    rank: -1\n")
    return tmp_path


def validate(folder, *files, stdin=""):
    return no_traceback(finetune("validate", *files, stdin=stdin, cwd=folder))


def test_a_valid_manifest_is_named_and_exits_0(folder):
    result = validate(folder, "good.yaml")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "✓ 1 FineTuneJob valid: nli\n"


def test_a_problem_names_file_line_field_and_what_is_allowed(folder):
    result = validate(folder, "rank.yaml")
    assert result.returncode == 1
    assert "rank.yaml:13: spec.lora.rank: Invalid value: -1: should be greater than or equal to 1" in result.stderr
    assert "1 problem in 1 manifest" in result.stderr
    assert result.stdout == ""


def test_every_problem_of_every_file_is_listed(folder):
    (folder / "typo.yaml").write_text(MANIFEST.replace("train:", "trian:") + "  training:\n    epochs: 0\n")
    result = validate(folder, "good.yaml", "rank.yaml", "typo.yaml")
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert [line.split(":")[:2] for line in lines[:-1]] == [
        ["rank.yaml", "13"],
        ["typo.yaml", "8"],
        ["typo.yaml", "9"],
        ["typo.yaml", "13"],
    ]
    assert any("spec.dataset.trian: unknown field; did you mean train?" in line for line in lines)
    assert lines[-1] == "error: 4 problems in 2 of 3 manifests"


def test_several_documents_keep_their_line_numbers_and_other_kinds_are_left_alone(folder):
    text = "\n---\n".join([SECRET, MANIFEST, MANIFEST.replace("name: nli", "name: Wrong_Name")])
    (folder / "many.yaml").write_text(text)
    result = validate(folder, "many.yaml")
    line = text.split("\n").index("  name: Wrong_Name") + 1
    assert result.returncode == 1
    assert "many.yaml:1: Secret is not checked, only FineTuneJobs are" in result.stderr
    assert f'many.yaml:{line}: metadata.name: Invalid value: "Wrong_Name"' in result.stderr
    assert "1 problem in 1 of 2 manifests" in result.stderr


def test_stdin_is_read_for_a_dash(folder):
    assert validate(folder, "-", stdin=MANIFEST).returncode == 0
    result = validate(folder, "-", stdin=MANIFEST.replace("hf://", "ftp://"))
    assert result.returncode == 1
    assert "<stdin>:7: spec.model.source: " in result.stderr
    assert "must be hf://owner/name" in result.stderr


def test_relative_file_addresses_start_at_the_manifest(folder):
    (folder / "local.yaml").write_text(MANIFEST.replace("s3://data/nli/train.jsonl", "file://./train.jsonl"))
    assert validate(folder.parent, str(folder / "local.yaml")).returncode == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: [1\nb: 2\n", "file.yaml:2: not YAML: "),
        ("", "file.yaml: is empty: a manifest needs apiVersion: finetune.dev/v1alpha1 and kind: FineTuneJob"),
        ("# a remark\n", "file.yaml: is empty"),
        ("just words\n", "file.yaml:1: is no FineTuneJob: a manifest is a YAML mapping"),
        ("- a\n- b\n", "file.yaml:1: is no FineTuneJob: a manifest is a YAML mapping"),
        (MANIFEST.replace("kind: FineTuneJob", "kind: FinetuneJob"), "file.yaml:2: kind: "),
        (MANIFEST.replace("v1alpha1", "v1"), "file.yaml:1: apiVersion: "),
        ("a: &a [*a]\n", "file.yaml:1: a[0][0]: is nested too deeply or repeats too much"),
        ("\n".join(LAUGHS), "is nested too deeply or repeats too much"),
        (SECRET, "there is no FineTuneJob in what was given"),
    ],
    ids=[
        "broken YAML",
        "empty",
        "only a remark",
        "text",
        "list",
        "kind misspelled",
        "wrong version",
        "endless",
        "a billion laughs",
        "another kind",
    ],
)
def test_what_is_no_manifest_is_refused_in_a_sentence(folder, content, sentence):
    (folder / "file.yaml").write_text(content)
    result = validate(folder, "file.yaml")
    assert result.returncode == 1
    assert sentence in result.stderr


def test_files_that_cannot_be_read_are_refused_in_a_sentence(folder):
    (folder / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    result = validate(folder, "missing.yaml", str(folder), "latin.yaml")
    assert result.returncode == 1
    assert "missing.yaml: no such file" in result.stderr
    assert f"{folder}: is a folder, not a manifest" in result.stderr
    assert "latin.yaml: is not UTF-8 text (byte 9)" in result.stderr
    assert "3 problems in 3 manifests" in result.stderr
