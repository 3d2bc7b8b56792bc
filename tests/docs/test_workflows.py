"""The workflows on GitHub: what they run is pinned, and is what the Makefile offers; and which tests a target takes."""

import json
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


@each_workflow
def test_the_token_can_only_read_but_where_a_job_asks_for_more(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert all(isinstance(job.get("permissions", {}), dict) for job in workflow["jobs"].values()), "never write-all"
    checkouts = [step for step in steps(path) if step.get("uses", "").startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@each_workflow
def test_no_command_is_built_from_what_others_can_write(path: Path) -> None:
    """GitHub pastes an expression into the script as it is; through `env` it stays data."""
    assert [step["run"] for step in steps(path) if "${{" in step.get("run", "")] == []


def test_a_release_is_signed_with_provenance_and_names_images_by_digest() -> None:
    release = ROOT / ".github" / "workflows" / "release.yml"
    scripts = "\n".join(step.get("run", "") for step in steps(release))
    attested = [step["with"] for step in steps(release) if step.get("uses", "").startswith("actions/attest@")]
    assert [each["subject-name"].rpartition("/")[2] for each in attested] == [
        *("finetune-operator", "finetune-trainer", "finetune-operator")
    ]
    assert all(each["push-to-registry"] and "outputs" in each["subject-digest"] for each in attested)
    signed = re.findall(r"cosign (sign|attest) .*?(\S+)$", scripts.replace('"', ""), re.MULTILINE)
    assert [command for command, _ in signed] == ["sign", "attest", "sign"]
    assert all(reference.endswith("@$digest") for _, reference in signed)
    assert ".image.digest = strenv(OPERATOR)" in scripts and ".trainer.image.digest = strenv(TRAINER)" in scripts


def test_the_update_bot_reads_every_file_that_pins() -> None:
    config = json.loads((ROOT / ".github" / "renovate.json").read_text())
    (pattern,) = config["pip_requirements"]["managerFilePatterns"]
    assert re.search(pattern.strip("/"), "constraints.txt")
    assert {"docker:pinDigests", "helpers:pinGitHubActionDigestsToSemver"} <= set(config["extends"])
    assert all((ROOT / "images" / image / "Containerfile").exists() for image in ("operator", "trainer"))


def test_the_night_runs_everything() -> None:
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
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
