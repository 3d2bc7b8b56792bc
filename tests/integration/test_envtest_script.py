"""`make envtest` fetches, checks and unpacks the binaries, from a local server that plays the release site."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "envtest.py"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL it is served at."""
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def release(folder: Path, url: str, versions: list[str], names: tuple[str, ...], digest: str | None = None) -> None:
    """Put archives of `names` for every version, and the index, into `folder`."""
    releases = {}
    for version in versions:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name in names:
                content = f"{name} {version}".encode()
                info = tarfile.TarInfo(f"controller-tools/envtest/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        data = buffer.getvalue()
        (folder / f"{version}.tar.gz").write_bytes(data)
        entry = {"selfLink": f"{url}/{version}.tar.gz", "hash": digest or hashlib.sha512(data).hexdigest()}
        systems = [f"{system}-{machine}" for system in ("linux", "darwin") for machine in ("amd64", "arm64")]
        releases[version] = {f"envtest-{version}-{system}.tar.gz": entry for system in systems}
    (folder / "index.yaml").write_text(yaml.safe_dump({"releases": releases}))


def envtest(target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "KUBEBUILDER_ASSETS": str(target), "NO_PROXY": "*", "no_proxy": "*"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=env, capture_output=True, text=True, check=False)


ALL = ("etcd", "kube-apiserver", "kubectl")


def test_the_newest_patch_release_is_unpacked(site: tuple[Path, str], tmp_path: Path):
    folder, url = site
    release(folder, url, ["v1.35.4", "v1.36.2", "v1.36.10", "v1.36.11-rc.0"], ALL)
    done = envtest(tmp_path / "bin", "--index", f"{url}/index.yaml")
    assert done.returncode == 0, done.stderr
    for name in ALL:
        assert (tmp_path / "bin" / name).read_text() == f"{name} v1.36.10"
        assert os.access(tmp_path / "bin" / name, os.X_OK)


def test_what_is_there_already_is_left_alone(site: tuple[Path, str], tmp_path: Path):
    folder, url = site
    release(folder, url, ["v1.36.2"], ALL)
    envtest(tmp_path / "bin", "--index", f"{url}/index.yaml")
    (folder / "index.yaml").unlink()
    again = envtest(tmp_path / "bin", "--index", f"{url}/index.yaml")
    assert again.returncode == 0
    assert "already" in again.stdout


@pytest.mark.parametrize(
    ("versions", "names", "digest", "sentence"),
    [
        (["v1.35.4"], ALL, None, "there is no release 1.36; the newest are v1.35.4"),
        (["v1.36.2"], ("etcd",), None, "the archive holds no kube-apiserver, kubectl"),
        (["v1.36.2"], ALL, "0" * 128, "the archive is damaged: its SHA-512 is"),
    ],
)
def test_a_release_that_cannot_be_used_is_refused(
    site: tuple[Path, str],
    tmp_path: Path,
    versions: list[str],
    names: tuple[str, ...],
    digest: str | None,
    sentence: str,
):
    folder, url = site
    release(folder, url, versions, names, digest)
    done = envtest(tmp_path / "bin", "--index", f"{url}/index.yaml")
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "bin").glob("*"))


def test_out_of_reach_says_what_to_do_instead(tmp_path: Path):
    done = envtest(tmp_path / "bin", "--index", "http://127.0.0.1:9/index.yaml")
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "KUBEBUILDER_ASSETS" in done.stderr
    assert "Traceback" not in done.stderr
