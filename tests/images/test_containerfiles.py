"""What an image must be to run in a restricted namespace, and to be known again: read off the Containerfiles."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from support.docs.chart import (
    CHART,
    ROOT,
    find,
    objects,
)

IMAGES = ("operator", "trainer")
EACH = pytest.mark.parametrize("image", IMAGES)
LABELS = {
    "title",
    "description",
    "licenses",
    "version",
    "revision",
    "created",
    "source",
}


def instructions(image: str) -> list[tuple[str, str]]:
    """(keyword, rest) of each, continuation lines joined and comments left out."""
    text = (ROOT / "images" / image / "Containerfile").read_text()
    text = re.sub(r"(?m)^\s*#.*\n", "", text).replace("\\\n", " ")
    return [(keyword, rest.strip()) for keyword, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def last_stage(image: str) -> list[tuple[str, str]]:
    found = instructions(image)
    start = max(index for index, (keyword, _) in enumerate(found) if keyword == "FROM")
    return found[start:]


@EACH
def test_it_runs_as_a_number_for_the_kubelet_cannot_tell_whether_a_name_is_root(image: str) -> None:
    users = [rest for keyword, rest in last_stage(image) if keyword == "USER"]
    assert users == ["65532:65532"]
    container = find(objects(), "Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert users[0] == f"{container['runAsUser']}:{container['runAsGroup']}"


@EACH
def test_libraries_that_ask_for_the_users_name_get_one(image: str) -> None:
    """Without it Kopf ends with 'getpwuid(): uid not found', and the operator watches nothing."""
    program = "import getpass, os; os.setgid(65532); os.setuid(65532); print(getpass.getuser())"
    (settings,) = [rest for keyword, rest in last_stage(image) if keyword == "ENV"]
    env = dict(setting.split("=", 1) for setting in settings.split())
    assert env["USER"] == "finetune"
    if os.geteuid():
        pytest.skip("only root can become another user")
    found = subprocess.run([sys.executable, "-c", program], env={"USER": env["USER"]}, capture_output=True, text=True)
    assert found.stdout == "finetune\n", found.stderr


@EACH
def test_no_shell_stands_between_the_kubelet_and_the_program(image: str) -> None:
    (entry,) = [rest for keyword, rest in last_stage(image) if keyword == "ENTRYPOINT"]
    assert isinstance(json.loads(entry), list)
    assert not [rest for keyword, rest in last_stage(image) if keyword in {"CMD", "SHELL", "ADD"}]


@EACH
def test_the_base_is_an_argument_pinned_to_a_patch_version_and_a_digest(image: str) -> None:
    found = instructions(image)
    (base,) = [rest for keyword, rest in found if keyword == "ARG" and rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=docker\.io/library/python:3\.\d+\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    stages = {"${BASE}", "${DEVEL_BASE}", "build", "runtime"}
    assert {rest.split()[0] for keyword, rest in found if keyword == "FROM"} <= stages


def test_both_have_the_same_base() -> None:
    assert len({rest for image in IMAGES for _, rest in instructions(image) if rest.startswith("BASE=")}) == 1


@EACH
def test_its_labels_say_what_it_is_and_from_where(image: str) -> None:
    (labels,) = [rest for keyword, rest in last_stage(image) if keyword == "LABEL"]
    found = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', labels))
    assert found.keys() == LABELS
    assert found["title"] == f"finetune-{image}"
    assert found["licenses"] == _project()["license"]
    arguments = dict(rest.split("=", 1) for keyword, rest in last_stage(image) if keyword == "ARG")
    assert arguments["VERSION"] == _project()["version"]
    for label in ("version", "revision", "created", "source"):
        assert found[label] == f"${{{label.upper()}}}"
        assert label.upper() in arguments


@EACH
def test_every_extra_it_installs_exists_and_every_package_is_pinned(image: str) -> None:
    runs = " ".join(rest for keyword, rest in instructions(image) if keyword == "RUN")
    installs = re.findall(r"pip install .*?(?=&&|$)", runs)
    assert installs
    by_hash = "--no-deps --require-hashes --requirement requirements.lock"
    assert all(by_hash in install or "--constraint constraints.txt" in install for install in installs)
    by_hash_at, own_at = (next(at for at, each in enumerate(installs) if word in each) for word in (by_hash, ".["))
    assert by_hash_at < own_at
    extras = "operator" if image == "operator" else dict(_arguments(image))["EXTRAS"]
    assert set(extras.split(",")) <= set(_project()["optional-dependencies"])


def test_the_constraints_pin_every_package_of_every_extra() -> None:
    """Those of flash-attn and linear attention are not: they are compiled against the machine that is at hand."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    text = (ROOT / "constraints.txt").read_text()
    pinned = {canonicalize_name(line.split("==")[0]) for line in text.splitlines() if "==" in line}
    extras = _project()["optional-dependencies"]
    wanted = [
        *_project()["dependencies"],
        *(line for name, lines in extras.items() if name not in ("flash", "linear-attention") for line in lines),
    ]
    names = {canonicalize_name(Requirement(line).name) for line in wanted} - {"finetune-operator"}
    assert names - pinned == set()
    assert "+cpu" not in text
    assert "://" not in text


def test_what_is_sent_to_the_engine_is_what_the_images_are_built_from() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {
        source
        for image in IMAGES
        for keyword, rest in instructions(image)
        if keyword == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert sent == copied
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.nightly  # it looks through every package of the environment
def test_the_list_of_packages_is_made_of_what_is_installed(tmp_path: Path) -> None:
    """The Containerfiles' command, on this Python instead of the image's."""
    commands = {re.search(r"cyclonedx-py [^&]*", rest)[0] for image in IMAGES for keyword, rest in instructions(image)
                if "cyclonedx-py" in rest}  # fmt: skip
    (command,) = commands
    there = {"/opt/finetune/bin/python": sys.executable, "/sbom.cdx.json": str(tmp_path / "sbom"),
             "cyclonedx-py": str(Path(sys.executable).with_name("cyclonedx-py"))}  # fmt: skip
    words = [there.get(word, word) for word in command.split()]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr  # it checks its output against CycloneDX's schema
    made = json.loads((tmp_path / "sbom").read_text())
    assert (made["bomFormat"], made["metadata"]["component"]["name"]) == ("CycloneDX", "finetune-operator")
    listed = {component["name"].lower(): component["version"] for component in made["components"]}
    assert {name: listed[name] for name in ("kopf", "pydantic", "torch")} == {
        name: version(name) for name in ("kopf", "pydantic", "torch")
    }


def test_the_trainers_working_folder_is_its_users() -> None:
    stage = last_stage("trainer")
    assert ("WORKDIR", "/scratch") in stage
    runs = [rest for keyword, rest in stage if keyword == "RUN"]
    assert "install --directory --owner 65532 --group 65532 /scratch" in runs


def test_the_trainer_has_what_compiles_its_kernels() -> None:
    assert last_stage("trainer")[0] == ("FROM", "runtime")
    (install,) = [rest for keyword, rest in instructions("trainer") if keyword == "RUN" and "apt-get install" in rest]
    assert {"gcc", "libc6-dev", "--no-install-recommends"} <= set(install.split())
    assert "rm -rf /var/lib/apt/lists/*" in install


def test_the_version_is_one() -> None:
    chart = (CHART / "Chart.yaml").read_text()
    assert f"version: {_project()['version']}\nappVersion: {_project()['version']}\n" in chart


def _arguments(image: str) -> list[tuple[str, str]]:
    return [(name, value) for keyword, rest in instructions(image) if keyword == "ARG"
            for name, _, value in [rest.partition("=")]]  # fmt: skip


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_kernels_for_linear_attention_are_those_of_the_extra() -> None:
    runs = next(rest for keyword, rest in instructions("trainer") if keyword == "RUN" and "LINEAR_ATTENTION" in rest)
    named = re.findall(r"'([a-z0-9-]+>=[0-9.]+)'", runs)
    assert set(_project()["optional-dependencies"]["linear-attention"]) < set(named)
