"""scripts/build-images.sh with a simulated engine: what it asks for, under which names, and what it leaves in dist/.

A real build needs a base image; docs/install.md has one with buildah.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.docs.chart import ROOT, find, objects

#: Writes each call down, a line of JSON, and prints the list that a real image would.
ENGINE = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(sys.argv) + "\\n")
if sys.argv[1] in ("run", "from"):
    print('{"bomFormat": "CycloneDX"}' if "cat" in sys.argv else "container-1")
"""


class Build:
    """A copy of what the script reads, a simulated engine on PATH, and the calls that were made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        for name in ("scripts/build-images.sh", "pyproject.toml", "Makefile"):
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "tree" / name)
        self.bin = folder / "bin"
        self.bin.mkdir()

    def install(self, engine: str) -> None:
        (self.bin / engine).write_text(ENGINE)
        (self.bin / engine).chmod(0o755)

    def run(self, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        inherited = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.folder), "CALLS": str(self.calls)}
        return subprocess.run(command or ("scripts/build-images.sh",), cwd=self.folder / "tree", text=True,
                              capture_output=True, env={**inherited, **settings}, timeout=60)  # fmt: skip

    def asked(self, verb: str) -> list[list[str]]:
        calls = [json.loads(line) for line in self.calls.read_text().splitlines()]
        return [call[2:] for call in calls if call[1] == verb]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build(tmp_path)


def after(arguments: list[str], option: str) -> list[str]:
    return [arguments[index + 1] for index, word in enumerate(arguments) if word == option]


def chart_images(registry: str) -> set[str]:
    """The names the chart takes with image.registry and nothing else."""
    deployment = find(objects({"image": {"registry": registry}}), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    return {container["image"], env["FINETUNE_OPERATOR_TRAINER_IMAGE"]}


@pytest.mark.parametrize("registry", ["", "registry.example.com/team", "localhost:5000/"])
def test_the_chart_finds_what_make_images_made_simulated(build: Build, registry: str) -> None:
    build.install("podman")
    found = build.run("make", "images", f"REGISTRY={registry}", ENGINE="podman")
    assert found.returncode == 0, found.stderr
    assert {name for call in build.asked("build") for name in after(call, "--tag")} == chart_images(registry)


def test_settings_reach_the_build_simulated(build: Build) -> None:
    build.install("podman")
    settings = {
        "BASE": "localhost/base",
        "TAG": "7",
        "SOURCE": "https://git.example.com/a",
        "BUILD_ARGS": "--network host",
    }
    assert build.run(ENGINE="podman", **settings).returncode == 0
    operator, trainer = build.asked("build")
    for image, call in (("operator", operator), ("trainer", trainer)):
        assert after(call, "--file") == [f"images/{image}/Containerfile"]
        assert after(call, "--tag") == [f"finetune-{image}:7"]
        assert after(call, "--network") == ["host"]
        assert call[-1] == "."
        arguments = dict(argument.split("=", 1) for argument in after(call, "--build-arg"))
        assert arguments.keys() == {"VERSION", "REVISION", "CREATED", "SOURCE", "BASE"}
        assert arguments["BASE"] == "localhost/base"
        assert arguments["SOURCE"] == "https://git.example.com/a"
    assert "push" not in build.calls.read_text()


@pytest.mark.parametrize("engine", ["podman", "buildah", "docker"])
def test_each_image_gets_its_list_simulated(build: Build, engine: str) -> None:
    build.install(engine)
    assert build.run(ENGINE=engine, TAG="7").returncode == 0
    for image in ("operator", "trainer"):
        text = (build.folder / "tree" / "dist" / f"finetune-{image}-7.cdx.json").read_text()
        assert json.loads(text) == {"bomFormat": "CycloneDX"}


def test_pushing_is_asked_for_simulated(build: Build) -> None:
    build.install("podman")
    assert build.run("make", "images", "PUSH=1", "REGISTRY=r.example.com", "TAG=7", ENGINE="podman").returncode == 0
    assert build.asked("push") == [["r.example.com/finetune-operator:7"], ["r.example.com/finetune-trainer:7"]]


def test_a_failed_build_stops_everything_simulated(build: Build) -> None:
    (build.bin / "podman").write_text("#!/bin/sh\nexit 3\n")
    (build.bin / "podman").chmod(0o755)
    assert build.run(ENGINE="podman").returncode == 3
    assert not list((build.folder / "tree" / "dist").iterdir())


def test_no_engine_is_said_in_one_sentence(build: Build) -> None:
    found = build.run(ENGINE="no-such-engine")
    assert found.returncode == 1
    assert found.stderr.startswith("No docker (with a running engine), podman or buildah was found")
