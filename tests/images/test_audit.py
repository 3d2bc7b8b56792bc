"""scripts/audit.py: the real pip-audit, asking a simulated vulnerability service."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from support.common.processes import free_port
from support.docs.chart import ROOT

Versions = dict[tuple[str, str], str]


class Service(ThreadingHTTPServer):
    """Knows, by (name, version), one vulnerability each."""

    known: Versions
    status = 200


class Answers(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, version = asked["package"]["name"], asked["version"]
        fix = self.server.known.get((name, version))
        affected = {
            "package": {"name": name, "ecosystem": "PyPI", "purl": f"pkg:pypi/{name}"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": fix}]}],
        }
        found = {"id": "PYSEC-2026-1", "aliases": [], "summary": "Bad.", "affected": [affected]}
        body = json.dumps({"vulns": [found]} if fix else {}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service(("127.0.0.1", 0), Answers)
    server.known = {("jinja2", "2.10"): "2.10.1", ("old", "1.0"): "1.1"}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def audit(tmp_path: Path, pins: str, port: int, on_github: bool = False) -> subprocess.CompletedProcess[str]:
    (tmp_path / "pins.txt").write_text(pins)
    command = [sys.executable, ROOT / "scripts/audit.py", tmp_path / "pins.txt", "--url", f"http://127.0.0.1:{port}/"]
    env = os.environ | {"GITHUB_ACTIONS": "true" if on_github else "false"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_a_vulnerable_package_fails_with_the_version_that_is_not_simulated(service: Service, tmp_path: Path) -> None:
    found = audit(tmp_path, "# pins\nold==1.0\nfine==2.0\n", service.server_port)
    assert found.returncode == 1, found.stderr
    assert found.stdout.splitlines() == [
        "old 1.0: PYSEC-2026-1, fixed in 1.1",
        "Audit: 1 of 2 pinned packages are known to be vulnerable",
    ]


def test_packages_without_any_pass_simulated(service: Service, tmp_path: Path) -> None:
    found = audit(tmp_path, "fine==2.0\n", service.server_port)
    assert found.stdout == "Audit: 0 of 1 pinned packages are known to be vulnerable\n"
    assert found.returncode == 0


def checked_nothing(found: subprocess.CompletedProcess[str], exit_code: int = 0) -> bool:
    said = "Audit: not checked, the vulnerability service cannot be reached\n"
    return (found.returncode, found.stdout, found.stderr) == (exit_code, said, "")


@pytest.mark.parametrize(("on_github", "exit_code"), [(False, 0), (True, 1)])
def test_offline_it_says_so_and_fails_on_github_alone(tmp_path: Path, on_github: bool, exit_code: int) -> None:
    assert checked_nothing(audit(tmp_path, "old==1.0\n", free_port(), on_github), exit_code)


@pytest.mark.parametrize("status", [404, 500])
def test_a_service_that_answers_no_question_is_not_taken_for_a_clean_bill_simulated(
    service: Service, tmp_path: Path, status: int
) -> None:
    service.status = status
    assert checked_nothing(audit(tmp_path, "old==1.0\n", service.server_port))


def test_a_mirror_that_knows_of_no_vulnerabilities_is_not_either_simulated(service: Service, tmp_path: Path) -> None:
    service.known = {}
    assert checked_nothing(audit(tmp_path, "old==1.0\n", service.server_port))
