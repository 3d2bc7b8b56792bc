"""Add Debian's packages to a CycloneDX list: `python debian_packages.py LIST FOLDER`.

FOLDER holds the image's os-release and dpkg's status file; without the latter, as in an image of another distribution,
nothing is added.
"""

import json
import sys
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from packageurl import PackageURL


def components(status: str, release: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield a component for each package that dpkg lists as installed."""
    distribution = f"{release['ID']}-{release['VERSION_ID']}"
    for paragraph in status.split("\n\n"):
        fields = HeaderParser().parsestr(paragraph.lstrip("\n"))
        if fields.get("Status", "").endswith(" installed"):
            name, version = fields["Package"], fields["Version"]
            qualifiers = {"arch": fields["Architecture"], "distro": distribution}
            url = PackageURL("deb", release["ID"], name, version, qualifiers).to_string()
            yield {"type": "library", "bom-ref": url, "name": name, "version": version, "purl": url}


def main() -> None:
    target, folder = map(Path, sys.argv[1:])
    lines = (folder / "os-release").read_text().splitlines()
    release = {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}
    status = folder / "status"
    found = list(components(status.read_text(), release)) if status.exists() else []
    listed = json.loads(target.read_text())
    listed["components"] = [*listed.get("components", []), *found]
    target.write_text(json.dumps(listed, indent=2) + "\n")


if __name__ == "__main__":
    main()
