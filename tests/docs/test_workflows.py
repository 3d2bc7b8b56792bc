"""The workflows on GitHub: what they run is pinned, and is what the Makefile offers; and which tests a target takes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.common import levels
from support.docs.chart import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


@each_workflow
def test_every_action_is_pinned_to_a_commit_with_its_version_beside_it(path: Path) -> None:
    """A tag can be moved to other code, a commit cannot."""
    uses = re.findall(r"\buses:\s*(.+)", path.read_text())
    assert len(uses) == sum("uses" in step for step in steps(path)) > 0
    assert [use for use in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)] == []


@each_workflow
def test_every_make_target_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = re.findall(
        r"^\s*(?:exec )?make ([a-z-]+)", "\n".join(step.get("run", "") for step in steps(path)), re.MULTILINE
    )
    assert set(asked) <= targets


def test_the_night_runs_everything() -> None:
    (workflow,) = WORKFLOWS
    text = yaml.safe_load(workflow.read_text())
    assert text[True]["schedule"], "YAML takes the key `on` for true"
    assert "make test-nightly" in [step.get("run") for step in steps(workflow)]


@pytest.mark.parametrize(
    ("name", "fixtures", "level"),
    [
        ("integration/test_end_to_end.py", set(), levels.E2E),
        ("operator/test_process.py", {"cluster", "tmp_path"}, levels.E2E),
        ("trainer/scenarios/test_kills.py", {"tmp_path"}, levels.SCENARIO),
        ("trainer/engine/test_loss.py::test_one", {"tmp_path"}, levels.UNIT),
        ("trainer/engine/test_fsdp.py::test_one", {"tmp_path"}, levels.SCENARIO),
    ],
)
def test_a_test_has_its_level_from_its_folder_and_fixtures(name: str, fixtures: set[str], level: str) -> None:
    assert levels.level_of(name, fixtures) == level


def test_every_worker_begins_with_long_tests_and_none_is_lost() -> None:
    long = [f"{name}[{number}]" for name in levels.LONGEST_FIRST[:4] for number in (1, 2)]
    names = [*(f"short.py::test_{number}" for number in range(20)), *reversed(long)]
    order = [names[index] for index in levels.deal(names, 2)]
    assert sorted(order) == sorted(names)
    starts = [order[0], order[len(order) // 2]]
    assert [name.partition("[")[0] for name in starts] == list(levels.LONGEST_FIRST[:2])


@pytest.mark.parametrize("name", sorted({*levels.LONGEST_FIRST, *levels.LONG_ELSEWHERE}))
def test_the_long_tests_are_still_where_they_are_said_to_be(name: str) -> None:
    path, _, start = name.partition("::")
    assert f"def {start}" in (levels.TESTS / path).read_text()
