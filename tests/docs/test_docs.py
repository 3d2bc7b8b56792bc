"""What the documentation says is there: links, commands, options, fields, settings, values, files, reasons."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml

from finetune_api import constants, crd_sweep, exit_codes
from finetune_api.crd import crd
from finetune_api.manifest import load_text
from finetune_api.status import Condition, Stage
from finetune_cli.app import app
from finetune_operator.settings import Settings
from support.docs import chart
from support.docs.markdown import FENCE, ROOT, blocks

DOCS = ROOT / "docs"
FINETUNE = Path(sys.executable).with_name("finetune")
PAGES = sorted(path for path in DOCS.rglob("*.md") if "templates" not in path.parts)
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "charts/finetune-operator/README.md", *PAGES]
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
FILE_NAME = re.compile(r"\.(py|ya?ml|jsonl?|md|txt|png|toml|safetensors|sh|crt|conf)$")
VALUES = yaml.safe_load((ROOT / "charts/finetune-operator/values.yaml").read_text())
SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
SWEEP_SCHEMA = crd_sweep.crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
each_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))


def inline(path: Path) -> list[str]:
    return [" ".join(code.split()) for code in INLINE.findall(FENCE.sub("", path.read_text()))]


def commands(path: Path) -> Iterator[list[str]]:
    """Every shell command of the page as words: in blocks, and in inline code that starts with one of ours."""
    lines = [line for body in blocks(path, "bash", "sh") for line in body.replace("\\\n", " ").splitlines()]
    for body in blocks(path, "console"):
        lines += [line.removeprefix("$ ") for line in body.replace("\\\n", " ").splitlines() if line.startswith("$ ")]
    lines += [code for code in inline(path) if code.startswith(("finetune ", "kubectl finetune ", "make ", "python "))]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("|&;"):
                yield words
                words = []
            else:
                words.append(word)
        yield words


@each_text
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text()))
    local = [target.partition("#")[0] for target in targets if not target.startswith(("http", "#", "mailto:"))]
    assert [target for target in local if not (path.parent / target).exists()] == []


@each_text
def test_every_finetune_command_exists_with_its_options(path: Path) -> None:
    group: Any = typer.main.get_command(app)
    for words in commands(path):
        if words[:2] == ["kubectl", "finetune"]:
            words = words[1:]
        if words[:1] != ["finetune"] or words[1:2] == ["--version"]:
            continue
        assert words[1:2], words
        command = group.commands.get(words[1])
        assert command is not None, f"finetune has no command {words[1]}"
        context = command.context_class(command, info_name=words[1])
        _, left, _ = command.make_parser(context).parse_args(list(words[2:]))
        assert not left, f"{' '.join(words)}: too many arguments"


@each_text
def test_every_plan_and_validation_of_an_example_runs(path: Path) -> None:
    shown = [words for words in commands(path) if words[:1] == ["finetune"] and words[1:2] in (["plan"], ["validate"])]
    for words in shown:
        if words[2:] and (ROOT / words[2]).is_file():
            done = subprocess.run([FINETUNE, *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


@each_text
def test_every_make_target_and_script_exists_with_its_options(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(path):
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if words[:1] == ["make"]:
            assert set(words[1:]) <= targets, words
        if words[:1] == ["python"] and words[1].endswith(".py"):
            code = (ROOT / words[1]).read_text()
            assert [word for word in words[2:] if word.startswith("--") and word not in code] == [], words


@each_text
def test_every_job_shown_is_valid(path: Path, tmp_path: Path) -> None:
    for body in blocks(path, "yaml"):
        for document in re.split(r"^---$", body, flags=re.MULTILINE):
            if f"kind: {constants.KIND}\n" in document:
                load_text(document, path.name, base=tmp_path)


@each_text
def test_every_setting_named_exists(path: Path) -> None:
    text = path.read_text()
    known = {f"FINETUNE_OPERATOR_{field.upper()}" for field in Settings.model_fields}
    known |= {value for name, value in vars(constants).items() if name.startswith("ENV_")}
    known |= set(re.findall(r'"(FINETUNE_\w+)"', (ROOT / "vllm-plugin/finetune_vllm/settings.py").read_text()))
    assert set(re.findall(r"\bFINETUNE_[A-Z0-9_]*[A-Z]", text)) <= known | {
        "FINETUNE_OPERATOR",
        "FINETUNE_JOB",
    }  # the last is a constant in Python


def in_values(keys: list[str]) -> bool:
    node: Any = VALUES
    for key in keys:
        if not isinstance(node, dict) or key not in node:
            return node == {}  # a map of the user's own
        node = node[key]
    return True


def in_schema(keys: list[str], node: dict[str, Any]) -> bool:
    for key in keys:
        node = node.get("items", node)
        if key not in node.get("properties", {}):
            return False
        node = node["properties"][key]
    return True


@cache
def sections() -> frozenset[str]:
    return frozenset({*VALUES, *SCHEMA["spec"]["properties"], "spec", "status"})


@each_text
def test_every_field_and_chart_value_named_exists(path: Path) -> None:
    unknown = []
    for code in inline(path):
        named = re.match(r"^([a-zA-Z]+(?:\.[a-zA-Z]+(?:\[\])?)+)(?=$|: )", code)
        if not named or FILE_NAME.search(named[1]):
            continue
        keys = named[1].replace("[]", "").split(".")
        known = any(in_schema(keys, {"properties": found}) for found in (SCHEMA, SWEEP_SCHEMA))
        known = known or in_schema(keys, SCHEMA["spec"]) or in_values(keys)
        if keys[0] in sections() and not known:
            unknown.append(named[1])
    assert unknown == []


def paths_of(node: Any, above: tuple[str, ...] = ()) -> Iterator[list[str]]:
    for key, value in node.items():
        yield [*above, key]
        if isinstance(value, dict):
            yield from paths_of(value, (*above, key))


@each_text
def test_every_block_of_chart_values_is_accepted(path: Path) -> None:
    for body in blocks(path, "yaml"):
        for document in yaml.safe_load_all(body):
            if document and "kind" not in document:
                assert [keys for keys in paths_of(document) if not in_values(keys)] == []
                assert chart.objects(document)  # values.schema.json is obeyed, and templates take it


@each_text
def test_every_file_named_exists(path: Path) -> None:
    tops = {
        "benchmarks",
        "charts",
        "cli",
        "crds",
        "docs",
        "examples",
        "images",
        "operator",
        "scripts",
        "tests",
        "trainer",
    }
    found = [code for code in inline(path) if re.fullmatch(r"[\w./-]+", code) and "/" in code]
    found += [word for words in commands(path) for word in words if re.fullmatch(r"[\w./-]+", word) and "/" in word]
    ours = [name for name in found if name.split("/")[0] in tops and "/build" not in name]
    ours = [name for name in ours if name != "operator/__init__.py"]  # the file that must not be there
    assert [name for name in ours if not (ROOT / name).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    def leaves(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from leaves(child)

    nav = re.search(r"^nav:\n(.*)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE | re.DOTALL)
    assert nav
    assert sorted(leaves(yaml.safe_load(nav[0])["nav"])) == [str(page.relative_to(DOCS)) for page in PAGES]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    loaded = re.compile(r"<script[^>]+src=\"http|<link[^>]+rel=\"stylesheet\"[^>]+href=\"http")
    assert [page for page in tmp_path.rglob("*.html") if loaded.search(page.read_text())] == [], "not from this site"
    assert (tmp_path / "assets" / "mermaid.js").stat().st_size > 1_000_000  # else the theme takes it from a CDN


@pytest.mark.parametrize(("page", "schema"), [("api.md", SCHEMA), ("sweep.md", SWEEP_SCHEMA)])
def test_every_field_has_one_anchor_and_no_rule_of_uris_is_said_twice(page: str, schema: dict[str, Any]) -> None:
    text = (DOCS / "reference" / page).read_text()
    anchors = re.findall(r"<a id=\"([^\"]+)\">", text)
    assert len(anchors) == len(set(anchors))
    blocks_ = {name: node for name, node in schema["spec"]["properties"].items() if "properties" in node}
    for block, node in blocks_.items():
        if block != "template":
            assert f"\n### spec.{block}\n" in text
            assert {f"spec.{block}.{name}" for name in node["properties"]} <= set(anchors)
    assert text.count("ust not hold credentials") <= 1


def test_the_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "generate_docs.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


#: Calls of the operator that take a reason, and its position.
TAKES_REASON = {
    "waiting": 0, "suspended": 0, "failed": 0, "rejected": 0, "WaitReason": 0, "CreateDenied": 0, "Rejection": 0,
    "Ending": 0, "ConditionValue": 1, "Event": 1,
}  # fmt: skip


def reasons_in_code() -> set[str]:
    """Every reason that the operator's code spells out: given to a call, or kept in a constant."""
    found: set[str] = set(get_args(Stage)) - {"Failed"}
    folder = ROOT / "operator/finetune_operator"
    files = (folder / name for name in ("kube/client.py", "kube/errors.py", "watch/wait_reasons.py"))
    for path in [*(folder / "core").rglob("*.py"), *files]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                at = TAKES_REASON.get(name)
                given = node.args[at] if at is not None and len(node.args) > at else None
                found |= {c.value for c in ast.walk(given) if isinstance(c, ast.Constant)} if given else set()
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.Tuple):
                found |= {c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant)}
    found |= set(re.findall(r"reason=(\w+)", (folder / "watch/wait_reasons.py").read_text()))
    return {word for word in found if isinstance(word, str) and re.fullmatch(r"([A-Z][a-z]+)+", word)}


#: Words of that form in the same places that are no reasons.
NO_REASONS = {"Job", "Complete", "Running", "Unknown", "Normal", "Warning", "ContainerCreating", "PodInitializing"}
NO_REASONS |= {"Failed", *get_args(Condition.model_fields["type"].annotation)} - {"Training", "Succeeded"}


def test_every_reason_has_a_cause_and_a_cure() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    told = set(re.findall(r"^\| (?:\d+ \| )?`(\w+)`", page, re.MULTILINE))
    outcomes = {*exit_codes.REASONS, exit_codes.OUTPERFORMED}
    assert reasons_in_code() - NO_REASONS - told == set(), "tell of them in scripts/operator_reasons.py"
    assert outcomes - told == set()
    assert told - outcomes - reasons_in_code() - {exit_codes.OUTPERFORMED} == set(), "no longer in the code"


def test_every_metric_used_by_alerts_and_dashboards_is_documented() -> None:
    known = set(re.findall(r"^\| `(finetune_\w+)`", (DOCS / "metrics.md").read_text(), re.MULTILINE))
    known |= {f"{name}_{part}" for name in known for part in ("bucket", "sum", "count")}
    files = (ROOT / "charts/finetune-operator/files").rglob("*")
    used = {
        name
        for path in files
        if path.suffix in (".yaml", ".json") and not path.name.startswith("finetune")
        for name in re.findall(r"\bfinetune_(?:operator|trainer)_\w+", path.read_text())
    }
    assert used and used <= known
