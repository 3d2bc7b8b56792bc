"""The list of what an image holds names Debian's packages as well."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from support.docs.chart import ROOT

RELEASE = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_ID="12"\nID=debian\n'
STATUS = """Package: libssl3
Status: install ok installed
Architecture: amd64
Version: 3.0.17-1~deb12u2
Description: Secure Sockets Layer toolkit
 Status: deinstall ok config-files

Package: removed
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: tzdata
Status: install ok installed
Architecture: all
Version: 2025b-0+deb12u1
"""
LIST = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "components": [{"type": "library", "name": "kopf", "version": "1"}]}  # fmt: skip


@pytest.mark.parametrize("is_debian", [True, False])
def test_installed_packages_are_added_and_the_list_stays_valid(is_debian: bool, tmp_path: Path) -> None:
    (tmp_path / "os-release").write_text(RELEASE)
    if is_debian:
        (tmp_path / "status").write_text(STATUS)
    target = tmp_path / "list"
    target.write_text(json.dumps(LIST))
    subprocess.run([sys.executable, ROOT / "images" / "debian_packages.py", target, tmp_path], check=True)
    text = target.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    listed = {each["name"]: each.get("purl") for each in json.loads(text)["components"]}
    debian = {
        "libssl3": "pkg:deb/debian/libssl3@3.0.17-1~deb12u2?arch=amd64&distro=debian-12",
        "tzdata": "pkg:deb/debian/tzdata@2025b-0%2Bdeb12u1?arch=all&distro=debian-12",
    }
    assert listed == {"kopf": None, **(debian if is_debian else {})}
