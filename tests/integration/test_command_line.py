"""A user's whole way with `finetune` alone, every part the real one: submit and watch, status, logs, download."""

import json
from pathlib import Path

import pytest
import yaml

from support.cli.run import finetune_process, no_traceback
from support.installation.installation import Stage, verify_digests


@pytest.fixture
def ctl(stage: Stage):
    """Run `finetune` as a member of the team: their kubeconfig, namespace and S3 keys."""
    env = {"KUBECONFIG": str(stage.cluster.kubeconfig), **stage.s3.env}

    def run(*arguments: str):
        return no_traceback(
            finetune_process(*arguments, "-n", stage.kube.namespace or "", env=env, cwd=stage.folder, timeout=400)
        )

    return run


def test_from_the_manifest_to_the_downloaded_adapter(stage: Stage, ctl, tmp_path: Path):
    stage.secret()
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(stage.manifest()))
    with stage.operator():
        submitted = ctl("submit", "job.yaml", "--watch")
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        assert "Training  " in submitted.stdout
        assert submitted.stdout.splitlines()[-1].split()[1] == "Succeeded"
        assert "Step 6" in ctl("logs", "nli").stdout
        page = ctl("status", "nli").stdout
        listed = ctl("list").stdout
    uri = f"s3://{stage.bucket}/adapters/nli"
    assert "Held-out loss" in page
    assert "loss █" in page, "the published losses fall"
    assert uri in page
    assert uri in listed

    for pod in stage.pods():
        stage.kube.patch("Pod", pod["metadata"]["name"], {"metadata": {"finalizers": None}})
        stage.kube.delete("Pod", pod["metadata"]["name"], gracePeriodSeconds=0)
    assert "Step 6" in ctl("logs", "nli").stdout, "from the store, now that the pod is gone"

    downloaded = ctl("download", "nli", "adapter")
    assert downloaded.returncode == 0, downloaded.stderr
    folder = tmp_path / "adapter"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    verify_digests(files, stage.get()["status"]["adapter"]["manifestDigest"])


def test_a_job_that_fails_ends_the_watch_with_2_and_says_what_to_do(stage: Stage, ctl, tmp_path: Path):
    stage.secret()
    manifest = stage.manifest(dataset={"train": f"s3://{stage.bucket}/nothing.jsonl"})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(manifest))
    with stage.operator():
        submitted = ctl("submit", "job.yaml", "--watch")
    assert submitted.returncode == 2, submitted.stdout + submitted.stderr
    assert "error: nli failed: " in submitted.stderr
    assert "nothing.jsonl" in submitted.stderr
    assert "hint:  " in submitted.stderr
    reason = json.loads(ctl("status", "nli", "-o", "json").stdout)["status"]["attempts"][-1]["reason"]
    assert f"{reason}: " in ctl("status", "nli").stdout
    assert ctl("download", "nli", "adapter").returncode == 2
