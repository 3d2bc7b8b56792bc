"""Fetch etcd, kube-apiserver and kubectl for the tests: `make envtest`.

Takes the archives that controller-runtime's setup-envtest takes, by the same index of releases, checks their SHA-512
and unpacks them to $KUBEBUILDER_ASSETS, else /usr/local/kubebuilder/bin. Exit code 1, with a sentence that says what to
do instead, where the internet is out of reach.
"""

import argparse
import hashlib
import io
import os
import platform
import re
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import yaml

INDEX = "https://raw.githubusercontent.com/kubernetes-sigs/controller-tools/HEAD/envtest-releases.yaml"
VERSION = "1.36"
BINARIES = ("etcd", "kube-apiserver", "kubectl")
_ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


_PLAIN = re.compile(r"^v\d+\.\d+\.\d+$")


class Unavailable(Exception):
    """It cannot be had; the text says why."""


def target() -> Path:
    return Path(os.environ.get("KUBEBUILDER_ASSETS") or "/usr/local/kubebuilder/bin")


def archive_name(version: str) -> str:
    system, machine = platform.system().lower(), platform.machine().lower()
    if machine not in _ARCHITECTURES or system not in ("linux", "darwin"):
        raise Unavailable(f"there are no such binaries for {system} on {machine}")
    return f"envtest-{version}-{system}-{_ARCHITECTURES[machine]}.tar.gz"


def newest(releases: Iterable[str], version: str) -> str:
    """Return the newest release of `version` (1.36, or 1.36.2 for that one alone)."""
    wanted = version.removeprefix("v")
    numbered = {
        name: [int(part) for part in name.removeprefix("v").split(".")] for name in releases if _PLAIN.match(name)
    }
    matching = [name for name in numbered if f"{name.removeprefix('v')}.".startswith(f"{wanted}.")]
    if not matching:
        known = ", ".join(sorted(numbered, key=lambda name: numbered[name])[-5:])
        raise Unavailable(f"there is no release {version}; the newest are {known or 'none'}")
    return max(matching, key=lambda name: numbered[name])


def find(index: str, version: str) -> tuple[str, str]:
    """URL and SHA-512 of the archive for this machine, out of the index of releases (YAML)."""
    releases = yaml.safe_load(index).get("releases") or {}
    release = newest(releases, version)
    name = archive_name(release)
    entry = releases[release].get(name)
    if entry is None:
        raise Unavailable(f"release {release} has no {name}; it has {', '.join(sorted(releases[release]))}")
    return str(entry["selfLink"]), str(entry["hash"])


def unpack(archive: bytes, digest: str, folder: Path) -> list[Path]:
    """Check the archive and put its binaries into `folder`; nothing is written when it cannot be used."""
    found = hashlib.sha512(archive).hexdigest()
    if found != digest:
        raise Unavailable(f"the archive is damaged: its SHA-512 is {found}, expected {digest}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        members = {Path(member.name).name: member for member in files if member.isfile()}
        missing = [name for name in BINARIES if name not in members]
        if missing:
            raise Unavailable(f"the archive holds no {', '.join(missing)}")
        folder.mkdir(parents=True, exist_ok=True)
        return [_extract(files, members[name], folder / name) for name in BINARIES]


def _extract(files: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> Path:
    content = files.extractfile(member)
    path.write_bytes(content.read() if content else b"")
    path.chmod(0o755)
    return path


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 -- an https constant, or what the index says
            return bytes(answer.read())
    except (urllib.error.URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(f"{url} cannot be reached: {reason}") from error


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", default=VERSION, help="Kubernetes version: 1.36 or 1.36.2 (default: %(default)s)")
    parser.add_argument("--index", default=INDEX, help="URL of the index of releases, such as a mirror's")
    options = parser.parse_args()
    folder = target()
    if all(os.access(folder / name, os.X_OK) for name in BINARIES):
        _say(f"{folder} has {', '.join(BINARIES)} already: the tests use them")
        return 0
    try:
        url, digest = find(_get(options.index).decode(), options.version)
        _say(f"fetching {url}")
        for path in unpack(_get(url), digest, folder):
            _say(f"  {path}")
    except (Unavailable, OSError) as error:
        sys.stderr.write(
            f"no real API server for the tests: {error}\n"
            "The tests then run against their stand-in, which has no RBAC, admission or CEL. To use real binaries, put"
            f" {', '.join(BINARIES)} into {folder} or a folder named by KUBEBUILDER_ASSETS.\n"
        )
        return 1
    _say("done: `make test` now runs against the real kube-apiserver")
    return 0


if __name__ == "__main__":
    sys.exit(main())
