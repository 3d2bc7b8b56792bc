"""`finetune validate` says what is wrong, where, and what is allowed."""

import pytest

from support.cli.run import MANIFEST, finetune, no_traceback

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


def test_a_gate_is_said_in_words(folder):
    gate = (
        "    onlyIf:\n    - {metric: evalLoss, atMost: 1.5}\n    - {metric: evalLoss, betterThan: s3://adapters/now}\n"
    )
    manifest = MANIFEST.replace("train.jsonl\n", "train.jsonl\n    evalFraction: 0.1\n")
    (folder / "gate.yaml").write_text(f"{manifest}  publish:\n{gate}")
    result = validate(folder, "gate.yaml")
    said = "nli is published only if evalLoss is at most 1.5 and evalLoss is better than that of s3://adapters/now"
    assert (result.returncode, said in result.stderr.replace("\n", " ")) == (0, True), result.stderr


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
        ["typo.yaml", "9"],
        ["typo.yaml", "13"],
    ]
    assert any("spec.dataset.trian: unknown field; did you mean train?" in line for line in lines)
    assert lines[-1] == "error: 3 problems in 2 of 3 manifests"


def test_several_documents_keep_their_line_numbers_and_other_kinds_are_left_alone(folder):
    text = "\n---\n".join([SECRET, MANIFEST, MANIFEST.replace("name: nli", "name: Wrong_Name")])
    (folder / "many.yaml").write_text(text)
    result = validate(folder, "many.yaml")
    line = text.split("\n").index("  name: Wrong_Name") + 1
    assert result.returncode == 1
    assert "many.yaml:1: Secret is not checked, only our own kinds are" in result.stderr
    assert f'many.yaml:{line}: metadata.name: Invalid value: "Wrong_Name"' in result.stderr
    assert "1 problem in 1 of 2 manifests" in result.stderr


def test_the_objects_of_a_list_are_checked_one_by_one(folder):
    indented = ["- " + text.replace("\n", "\n  ").rstrip() + "\n" for text in (MANIFEST, SECRET, MANIFEST)]
    text = "apiVersion: v1\nkind: List\nitems:\n" + "".join(indented).replace("name: nli", "name: second", 1)
    (folder / "list.yaml").write_text(text)
    result = validate(folder, "list.yaml")
    assert (result.returncode, result.stdout) == (0, "✓ 2 FineTuneJobs valid: second, nli\n")
    assert "list.yaml:15: Secret is not checked" in result.stderr
    (folder / "list.yaml").write_text(text + "    lora: {rank: 0}\n")
    result = validate(folder, "good.yaml", "list.yaml")
    assert result.returncode == 1
    line = len(text.splitlines()) + 1
    assert f"list.yaml:{line}: spec.lora.rank: Invalid value: 0: should be" in result.stderr
    assert "1 problem in 1 of 3 manifests" in result.stderr


def test_what_kubectl_takes_is_valid(folder):
    (folder / "job.yaml").write_text(MANIFEST + "  lora:\n  suspend: null\n  activeDeadlineSeconds: 3600.0\n")
    assert validate(folder, "job.yaml").returncode == 0


@pytest.mark.parametrize("address", ["s3://AKIA:hunter2@data/x", "s3://AKIA:a/hunter2@data/x", "S3://AKIA:hunter2@d/x"])
def test_a_secret_in_a_uri_is_not_repeated(folder, address):
    (folder / "job.yaml").write_text(MANIFEST.replace("s3://data/nli/train.jsonl", address))
    result = validate(folder, "job.yaml")
    assert "must not hold credentials: put them in a Secret and name it in secretRef" in result.stderr
    assert "hunter2" not in result.stdout + result.stderr


@pytest.mark.parametrize("command", ["plan", "run", "submit"])
def test_other_commands_refuse_bad_text_in_the_same_sentence(folder, command):
    (folder / "bad.yaml").write_text(MANIFEST.replace("name: nli", "name: {{ .Values.name }}"))
    result = no_traceback(finetune(command, "bad.yaml", cwd=folder, env={"KUBECONFIG": "/nowhere"}))
    assert result.returncode
    assert "bad.yaml:4: metadata.name: a key must be plain text" in result.stderr


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
        (
            "just words\n",
            "a manifest is a YAML mapping with apiVersion, kind, metadata and spec, this is a single value",
        ),
        ("- a\n- b\n", "file.yaml:1: is no FineTuneJob: a manifest is a YAML mapping with apiVersion"),
        (
            MANIFEST.replace("kind: FineTuneJob", "kind: FinetuneJob"),
            'file.yaml:2: kind: Unsupported value: "FinetuneJob": supported values: "FineTuneJob", "FineTuneSweep"; '
            "did you mean FineTuneJob?\nerror: 1 problem in 1 manifest",
        ),
        (MANIFEST.replace("e.dev/v1alpha1\nkind: FineTuneJob", "e.io/v1\nkind: FineTuneSwep"), "2 problems in 1"),
        (
            MANIFEST.replace("kind: FineTuneJob\n", ""),
            "file.yaml:1: kind: Required value: FineTuneJob or FineTuneSweep\n",
        ),
        (MANIFEST.replace("v1alpha1", "v1"), "file.yaml:1: apiVersion: "),
        (MANIFEST + "  image: a\0b\n", "file.yaml:12: not YAML: no text may hold the character U+0000"),
        (
            MANIFEST.replace("name: nli", "name: {{ .Values.name }}"),
            "file.yaml:4: metadata.name: a key must be plain text; is this a template that was not rendered?",
        ),
        ("? [a, b]\n: c\n", "file.yaml:1: a key must be plain text"),
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
        "kind and version wrong",
        "no kind",
        "wrong version",
        "NUL",
        "template",
        "list as key",
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
    (folder / "latin.yaml").write_bytes(b"kind: x\nname: caf\xe9\n")
    (folder / "wide.yaml").write_bytes(MANIFEST.encode("utf-16"))
    (folder / "weights.yaml").write_bytes(b"\x80\0\1")
    result = validate(folder, "missing.yaml", str(folder), "latin.yaml", "wide.yaml", "weights.yaml")
    assert result.returncode == 1
    assert "missing.yaml: no such file" in result.stderr
    assert f"{folder}: is a folder, not a manifest" in result.stderr
    assert "latin.yaml:2: is not UTF-8 text: byte 18 of the file is 0xe9; save it as UTF-8" in result.stderr
    assert "wide.yaml: is UTF-16 text: save it as UTF-8" in result.stderr
    assert "weights.yaml: is no text: a manifest is a YAML file in UTF-8" in result.stderr
    assert "5 problems in 5 manifests" in result.stderr


def test_what_only_this_machine_can_read_is_named_and_is_no_fault(folder):
    local = MANIFEST.replace("hf://mistralai/Mistral-7B-v0.3", "file://./base")
    local = local.replace("s3://adapters/nli", "file:///tmp/{name}")
    (folder / "local.yaml").write_text(local)
    result = validate(folder, "local.yaml")
    assert result.returncode == 0
    assert result.stdout == "✓ 1 FineTuneJob valid for finetune run: nli\n"
    assert "local.yaml: the cluster cannot read spec.model.source, spec.output.uri" in result.stderr
    assert "hint:  for a cluster, put these at s3://bucket/key" in result.stderr


def test_the_output_may_hold_the_jobs_name_and_no_other_field(folder):
    named = MANIFEST.replace("s3://adapters/nli", "s3://adapters/{name}/x")
    (folder / "named.yaml").write_text(named)
    assert validate(folder, "named.yaml").returncode == 0
    (folder / "typo.yaml").write_text(named.replace("{name}", "{nmae}"))
    assert (
        "may hold {name}, which stands for the job's name, and no other braces" in validate(folder, "typo.yaml").stderr
    )
    (folder / "data.yaml").write_text(MANIFEST.replace("s3://data/", "s3://data/{name}/"))
    assert "spec.dataset.train: Invalid value" in validate(folder, "data.yaml").stderr


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("learningRate: 1e-4", "spec.training.learningRate?"),
        ("rank: 32", "spec.lora.rank?"),
        ("training: {num_train_epochs: 1}", "spec.training.epochs?"),
        ("training: {per_device_train_batch_size: 1}", "spec.training.microBatchSize?"),
        ("training: {max_seq_length: 1}", "spec.training.maxLength?"),
        ("lora: {r: 8}", "spec.lora.rank?"),
        ("lora: {targetmodules: [x]}", "spec.lora.targetModules?"),
        ("secretRef: {name: x}", "spec.model.secretRef or spec.dataset.secretRef or "),
    ],
)
def test_a_field_of_another_place_or_trainer_is_understood(folder, line, meant):
    (folder / "other.yaml").write_text(MANIFEST + f"  {line}\n")
    assert f"unknown field; did you mean {meant}" in validate(folder, "other.yaml").stderr


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("s3://Data/x", "a bucket has 3 to 63 lowercase letters"),
        ("s3://ab/x", "a bucket has 3 to 63 lowercase letters"),
        ("/data/rows.jsonl", "a path is written file:///absolute/path"),
        ("file://rows.jsonl", "file:// takes an absolute path"),
        ("gs://bucket/x", "it begins with none of these schemes"),
        ("'s3://data/x '", "there is a space before or after it"),
        ("'s3://data/my /x'", "a name in its path begins or ends with a space"),
        ("'s3://data/ my/x'", "a name in its path begins or ends with a space"),
        ("'file:///data/x /y'", "a name in its path begins or ends with a space"),
        ("s3://data//x", "two slashes follow each other"),
        ("s3:/data/x", "two slashes follow the scheme"),
        ("S3://data/x", "schemes are lowercase"),
        ("'s3://data/*.jsonl'", "there are no wildcards"),
        ("https://example.org/x", "download it, or put it into a bucket"),
        ("hf://squad", "the owner or the name is missing"),
        ("stanfordnlp/snli", "a repository of the hub is written hf://owner/name"),
        ("./rows.jsonl", "file://./path for this manifest's folder"),
    ],
)
def test_a_wrong_place_is_told_why(folder, source, why):
    (folder / "place.yaml").write_text(MANIFEST.replace("s3://data/nli/train.jsonl", source))
    assert why in validate(folder, "place.yaml").stderr


def test_problems_come_in_the_order_of_the_file_with_the_value_of_a_wrong_type(folder):
    (folder / "two.yaml").write_text(MANIFEST + "  training: {seed: x}\n  lora: {rank: '8'}\n")
    first, second, _ = validate(folder, "two.yaml").stderr.splitlines()
    assert first.endswith('spec.training.seed: Invalid value: "string": must be of type integer: "x"')
    assert second.endswith('"string": must be of type integer: "8" (write it without quotes)')


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("activeDeadlineSeconds: 1h", '"1h" (a number of seconds: 3600)'),
        ("ttlSecondsAfterFinished: 1h30m", '"1h30m" (a number of seconds: 5400)'),
        ("recovery: {backoffSeconds: 1.5m}", '"1.5m" (a number of seconds: 90)'),
        ("training: {epochs: '3'}", '"3" (write it without quotes)'),
        ("training: {epochs: 3d}", 'number: "3d"\n'),
        ("training: {learningRate: '2e-4'}", "(write it without quotes)"),
        ("activeDeadlineSeconds: 3,600", "(write 3600)"),
        ("suspend: yess", "(write true or false)"),
        ("image: 1.5", "must be of type string: 1.5 (write it in quotes)"),
        ("lora: {targetModules: 'q_proj,k_proj'}", "(write [q_proj, k_proj])"),
        ("cache: models", "(write {claimName: models})"),
        ("quantization: {type: nf5}", 'supported values: "nf4", "fp4"; did you mean nf4?'),
        (
            "publish:\n    onlyIf:\n    - betterThan:s3://adapters/now",
            "(a space belongs after the colon: betterThan: s3:",
        ),
        ("publish: {}", "spec.publish.onlyIf: Required value: conditions that all must be met"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_what_to_write(folder, line, says):
    (folder / "text.yaml").write_text(MANIFEST + f"  {line}\n")
    assert says in validate(folder, "text.yaml").stderr


def test_rows_in_the_place_of_a_manifest_are_recognized(folder):
    assert "rows.jsonl: holds rows, and is no manifest (finetune init --data" in validate(folder, "rows.jsonl").stderr


def test_a_kustomization_is_recognized(folder):
    (folder / "kustomization.yaml").write_text("resources: [../base]\n")
    said = validate(folder, "kustomization.yaml").stderr
    assert "kustomization.yaml: is a kustomization, which kubectl turns into manifests" in said
