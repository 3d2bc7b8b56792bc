"""Write images/*/requirements.lock: each image's packages as constraints.txt pins them, with the hashes of their files.

pip itself says which file it would take, for every Python and processor that an image may have. What is written names
no index, and holds for any that serves these files. PyTorch is left out, and what it alone asks for: its builds, for
CUDA or without, differ in their files and in what they need. constraints.txt pins it.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parents[1]
IMAGES: Final = {"operator": ("operator", "tpe"), "trainer": ("trainer", "gpu", "wandb", "mlflow")}
PYTHONS: Final = ("3.11", "3.12", "3.13", "3.14")
PROCESSORS: Final = ("x86_64", "aarch64")
#: Debian bookworm's C library; wheels for older ones run on it, too.
GLIBC_MINOR: Final = 36
OWN: Final = "finetune-operator"
LEFT_OUT: Final = "torch"
Pins = dict[str, str]


def pins(text: str) -> Pins:
    """Version by name in pip's canonical form."""
    found = (line.split("==") for line in text.splitlines() if "==" in line)
    return {canonicalize_name(name): version.strip() for name, version in found}


def closure(lines: Iterable[str], python: str, processor: str) -> set[str]:
    """Return the names of all that these requirements need on such a machine, as the installed packages tell it."""
    machine = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": processor}
    seen: set[tuple[str, str]] = set()
    wanted = [(line, "") for line in lines]
    while wanted:
        line, extra = wanted.pop()
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        fits = not requirement.marker or requirement.marker.evaluate({**machine, "extra": extra})
        if name == LEFT_OUT or not fits:
            continue
        for wished in ("", *requirement.extras):
            if (name, wished) not in seen:
                seen.add((name, wished))
                wanted += [(each, wished) for each in requires(name) or []]
    return {name for name, _ in seen}


def requirements(image: str) -> Iterator[str]:
    """Return what pyproject.toml asks for in the image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield from project["dependencies"]
    for extra in IMAGES[image]:
        yield from project["optional-dependencies"][extra]


def hashes(wanted: Pins, python: str, processor: str) -> dict[str, str]:
    """Return the SHA-256 of the file that pip takes for each package on such a machine."""
    tags = [f"manylinux_2_{minor}_{processor}" for minor in range(GLIBC_MINOR, 4, -1)]
    tags += [f"manylinux{year}_{processor}" for year in ("2014", "2010", "1")]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run",
                   "--ignore-installed", "--no-deps", "--only-binary=:all:", "--report=-", f"--target={folder}",
                   f"--python-version={python}", *(f"--platform={tag}" for tag in tags),
                   *(f"{name}=={version}" for name, version in sorted(wanted.items()))]  # fmt: skip
        report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {
        canonicalize_name(each["metadata"]["name"]): each["download_info"]["archive_info"]["hashes"]["sha256"]
        for each in report["install"]
    }


def lock(image: str, pinned: Pins) -> str:
    """Return the text of the image's lock file."""
    found: dict[str, set[str]] = defaultdict(set)
    for python in PYTHONS:
        for processor in PROCESSORS:
            names = closure(requirements(image), python, processor)
            for name, digest in hashes({name: pinned[name] for name in names}, python, processor).items():
                found[name].add(digest)
    lines = [
        f"# Made by `make constraints` for Python {', '.join(PYTHONS)} on {' and '.join(PROCESSORS)}; without PyTorch."
    ]
    for name, digests in sorted(found.items()):
        lines += [" \\\n    ".join([f"{name}=={pinned[name]}", *(f"--hash=sha256:{each}" for each in sorted(digests))])]
    return "\n".join(lines) + "\n"


def main() -> None:
    pinned = pins((ROOT / "constraints.txt").read_text())
    for image in IMAGES:
        (ROOT / "images" / image / "requirements.lock").write_text(lock(image, pinned))


if __name__ == "__main__":
    main()
