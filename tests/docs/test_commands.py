"""Every command of the README and of the quickstart page is run, in order, in a copy of the repository.

The README's cluster is the API server that all tests run on, with Helm's SDK, kubectl, the real operator and a real S3
server; its trainer is simulated, for the job shown wants a GPU and seven billion weights.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api import constants
from finetune_api.manifest import load_text
from finetune_api.spec import FineTuneJob
from finetune_api.uri import parse
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.open import open_store
from support.docs import helm_command
from support.docs.markdown import ROOT, blocks
from support.node import fake_trainer
from support.node.node import ProcessNode
from support.operator import process
from support.server import server as clusters
from support.stores.s3 import S3Server

README, QUICKSTART = ROOT / "README.md", ROOT / "docs" / "quickstart.md"
#: What a block shows and this test leaves out, and why.
NOT_RUN = {
    "make test": "it is the run that this test belongs to",
    "make images REGISTRY=registry.example.com/team PUSH=1": "it wants a container engine and a registry",
}
#: What is written smaller in the copy, file by file, to run every command in little time; the night runs it as it is.
SMALLER = {
    "prepare.py": [
        ("DOCUMENTS: Final = 51_000", "DOCUMENTS: Final = 500"),
        ("EVAL_ROWS: Final = 240", "EVAL_ROWS: Final = 24"),
    ],
    "finetunejob.yaml": [("    epochs: 5\n", "    maxSteps: 10\n"), ("maxRows: 120", "maxRows: 12")],
}
NAMESPACE = "finetune"


def lines(page: Path) -> list[str]:
    """The shell lines of a page's blocks, less comments; what a console block shows of the output is left out."""
    found: list[str] = []
    for body in blocks(page, "bash"):
        found += body.replace("\\\n", " ").splitlines()
    for body in blocks(page, "console"):
        found += [line[2:] for line in body.replace("\\\n", " ").splitlines() if line.startswith("$ ")]
    commands = [" ".join(line.partition(" # ")[0].split()) for line in found]
    return [command for command in commands if command and command not in NOT_RUN]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what git would hand out, with the installed environment."""
    folder = tmp_path / "finetune"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(folder / name, (0, 0))  # for make: nothing is to be installed into the environment that runs this test
    return folder


def write_smaller(checkout: Path) -> None:
    for name, changes in SMALLER.items():
        file = checkout / "examples" / "quickstart" / name
        text = file.read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{name} has no {old!r}"
            text = text.replace(old, new)
        file.write_text(text)


def shell(script: list[str], folder: Path, env: dict[str, str]) -> str:
    """Run the lines in one shell that stops at the first failure; the output."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(["set -x", *script])],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.e2e
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", ["smaller", pytest.param("whole", marks=pytest.mark.nightly)])
def test_the_quickstart_runs_as_its_page_says_and_keeps_its_promise(checkout: Path, size: str) -> None:
    if size == "smaller":
        write_smaller(checkout)
    adapter = checkout / "examples/quickstart/build/adapter"
    script = lines(QUICKSTART)
    end = script.index("make quickstart") + 1
    page = shell(script[:end], checkout, dict(os.environ))
    metrics = json.loads((adapter / "manifest.json").read_text())["metrics"]
    assert metrics["evalLoss"] < metrics["evalLossBefore"]
    if size == "whole":
        assert metrics["evalLoss"] < metrics["evalLossBefore"] / 2
        assert metrics["accuracy"] > metrics["accuracyBefore"] + 0.25
        assert metrics["accuracy"] > 0.75
    for said in ("Held-out loss", "Right labels", str(adapter)):
        assert said in page
    shown = re.findall(r"`([a-z_]+\.(?:json|safetensors|md))`", QUICKSTART.read_text())
    assert [name for name in shown if not (adapter / name).exists()] == []
    shell(script[end:], checkout, dict(os.environ))


def publish_an_adapter(job: FineTuneJob, s3: S3Server, folder: Path) -> str:
    """Publish what the simulated trainer says it has made; the digest of its manifest."""
    (folder / "made").mkdir()
    (folder / "made" / constants.ADAPTER_CONFIG_FILE).write_text("{}")
    (folder / "made" / constants.ADAPTER_WEIGHTS_FILE).write_bytes(b"weights")
    uri = parse(job.spec.output.uri)
    s3.client().create_bucket(Bucket=uri.authority)
    store = open_store(uri, Credentials.for_role("output", env=s3.env), field="output.uri")
    bundle = Bundle(folder / "made", ARTIFACTS["Adapter"], base_model="org/base", rank=job.spec.lora.rank, metrics={})
    return AdapterOutput(store, job.metadata).publish(bundle).manifest_digest


@pytest.fixture
def cluster() -> Iterator[clusters.Cluster]:
    """A cluster of this test's own: the chart brings the definitions that other tests want to keep."""
    with clusters.start() as running:
        for plural in (constants.PLURAL, constants.SWEEP_PLURAL):
            running.kube.delete("CustomResourceDefinition", f"{plural}.{constants.GROUP}")
        yield running


@pytest.mark.e2e
@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_the_readmes_commands_install_run_and_download(
    checkout: Path, cluster: clusters.Cluster, s3: S3Server, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    path = fake_trainer.install(programs)
    helm_command.install(programs)
    (manifest,) = (body for body in blocks(README, "yaml") if constants.KIND in body)
    (checkout / "finetunejob.yaml").write_text(manifest)
    published = publish_an_adapter(load_text(manifest, "README.md"), s3, tmp_path)
    env = os.environ | s3.env | {"PATH": path, "KUBECONFIG": str(tmp_path / "kubeconfig")}
    env["HELM_DRIVER"] = "secret" if cluster.is_real else "memory"
    shutil.copy(cluster.kubeconfig, env["KUBECONFIG"])
    script = [line for line in lines(README) if line not in lines(QUICKSTART)]
    first = next(number for number, line in enumerate(script) if line.startswith("helm install"))
    applied = script.index("kubectl apply -f finetunejob.yaml", first) + 1
    # The README begins with what the installation, further down, makes possible.
    shell(script[first : first + 1], checkout, env)
    with (
        ProcessNode(cluster, NAMESPACE, tmp_path, env={"PATH": path, fake_trainer.ENV_DIGEST: published}),
        process.running(as_the_charts_account(cluster, tmp_path), tmp_path, {"namespaces": [NAMESPACE]}),
    ):
        page = shell([*script[first + 1 : applied], *script[:first], *script[applied:]], checkout, env)
    assert re.search(r"\+ finetune watch mistral-nli\n[0-9:]{8}  Succeeded  20/20", page)
    assert (checkout / "adapter" / constants.ADAPTER_WEIGHTS_FILE).read_bytes() == b"weights"


def as_the_charts_account(cluster: clusters.Cluster, folder: Path) -> Path:
    """A kubeconfig with the rights of the operator just installed, where the server knows rights."""
    if not cluster.is_real:
        return cluster.kubeconfig
    access = cluster.access_of_service_account(NAMESPACE, "finetune-finetune-operator")
    return access.write_kubeconfig(folder / "operator.kubeconfig")
