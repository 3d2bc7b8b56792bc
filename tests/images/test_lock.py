"""The lock files that the images install from: whole, in step with constraints.txt, and every file with its hash."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from support.docs.chart import ROOT


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "scripts" / "lock.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lock = _script()
EACH = pytest.mark.parametrize("image", lock.IMAGES)


def _path(image: str) -> Path:
    return ROOT / "images" / image / "requirements.lock"


def _locked(image: str) -> dict[str, str]:
    return lock.pins(re.sub(r" \\\n.*", "", _path(image).read_text()))


@EACH
def test_it_has_what_the_image_needs_in_the_versions_of_constraints_txt(image: str) -> None:
    pinned = lock.pins((ROOT / "constraints.txt").read_text())
    names = {
        name
        for python in lock.PYTHONS
        for processor in lock.PROCESSORS
        for name in lock.closure(lock.requirements(image), python, processor)
    }
    assert _locked(image) == {name: pinned[name] for name in names}, "run make constraints"
    assert lock.LEFT_OUT not in names


@EACH
def test_every_package_has_a_hash_and_no_index_is_named(image: str) -> None:
    text = _path(image).read_text()
    for entry in re.split(r"\n(?! )", text.strip())[1:]:
        assert re.fullmatch(r"[a-z0-9-]+==[^ ]+( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry
    assert "://" not in text


@EACH
def test_the_image_installs_the_extras_that_were_locked(image: str) -> None:
    containerfile = (ROOT / "images" / image / "Containerfile").read_text()
    extras = ",".join(lock.IMAGES[image])
    assert f"[{extras}]" in containerfile or f"EXTRAS={extras}\n" in containerfile


def test_what_holds_only_elsewhere_is_left_out() -> None:
    names = lock.closure(["rich", "torch; python_version < '3'", "kopf; platform_machine == 'other'"], "3.13", "x86_64")
    assert {"rich", "pygments"} <= names
    assert not names & {"torch", "kopf"}
