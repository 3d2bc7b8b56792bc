"""Are the pinned packages known to be vulnerable? Asks the OSV service through pip-audit; exit code 1 when one is.

Where the service cannot be reached, one line says that nothing was checked. That fails on GitHub, where the service is
known to be reachable, and nowhere else: offline, everything else is still checked.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
#: Has known vulnerabilities: a service that knows none of it cannot be asked, or is a mirror without them.
CANARY: Final = "jinja2==2.10"


def ask(requirements: Path, service: list[str]) -> list[dict[str, Any]] | None:
    """Return what pip-audit says of each package; None when it gets no answer."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip",
               "--progress-spinner=off", "--vulnerability-service=osv", "--timeout=5", "--format=json",
               *service]  # fmt: skip
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        return list(json.loads(found.stdout)["dependencies"])
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requirements", nargs="?", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--url", help="another address of the service")
    options = parser.parse_args()
    service = [f"--osv-url={options.url}"] if options.url else []
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "canary.txt"
        canary.write_text(CANARY)
        known = ask(canary, service)
        audited = ask(options.requirements, service) if known and known[0].get("vulns") else None
    if audited is None:
        sys.stdout.write("Audit: not checked, the vulnerability service cannot be reached\n")
        return 1 if os.environ.get("GITHUB_ACTIONS") == "true" else 0
    vulnerable = [package for package in audited if package.get("vulns")]
    for package in vulnerable:
        for vulnerability in package["vulns"]:
            fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
            sys.stdout.write(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}\n")
    sys.stdout.write(f"Audit: {len(vulnerable)} of {len(audited)} pinned packages are known to be vulnerable\n")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
