"""The Python client against the tests' cluster, with the API's own models."""

import hashlib
import json
import threading

import pytest

from finetune_api.manifest import ManifestError
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_cli.client import FineTune, FineTuneError, JobFailed, _document
from support.cli.run import MANIFEST
from support.docs.markdown import ROOT, blocks
from support.server.client import wait_until
from support.simulation import job_states as states

PAGE = ROOT / "docs" / "python.md"
SPEC = FineTuneJobSpec(
    model={"source": "hf://org/base"}, dataset={"train": "s3://data/a.jsonl"}, output={"uri": "s3://adapters/{name}"}
)


@pytest.fixture
def client(cluster, namespace):
    return FineTune(namespace, kubeconfig=cluster.kubeconfig)


def adapter(folder, **files):
    """A published adapter in a folder of this machine; its digest."""
    data = {"adapter_config.json": b"{}", "training/log.txt": b"12:00:00  Training on 4 rows\n", **files}
    for path, content in data.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    records = [
        {"path": path, "sizeBytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in data.items()
    ]
    text = json.dumps({"schemaVersion": 1, "kind": "Adapter", "createdAt": "2026-01-01T00:00:00Z", "files": records})
    (folder / "manifest.json").write_text(text)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@pytest.mark.parametrize("form", ["spec", "mapping", "file"])
def test_a_job_is_submitted_with_what_was_said_and_no_more(client, kube, tmp_path, form):
    (tmp_path / "job.yaml").write_text(MANIFEST)
    spec = SPEC.model_dump(mode="json", by_alias=True, exclude_unset=True)
    mapping = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "x"}, "spec": spec}
    job = {"spec": SPEC, "mapping": mapping, "file": tmp_path / "job.yaml"}[form]
    run = client.submit(job, name="nli")
    assert (run.name, [each.name for each in client.list()]) == ("nli", ["nli"])
    assert set(_document(job).data["spec"]) == {"model", "dataset", "output"}, "defaults are the cluster's to fill in"
    run.suspend()
    assert kube.get("FineTuneJob", "nli")["spec"]["suspend"] is True
    run.delete()
    with pytest.raises(FineTuneError, match="nli"):
        client.get("nli")


def test_what_is_wrong_is_said_before_the_cluster_is_asked(client):
    wrong = SPEC.model_dump(mode="json", by_alias=True, exclude_unset=True) | {"lora": {"rank": 0}}
    head = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "nli"}}
    with pytest.raises(ManifestError, match=r"spec\.lora\.rank"):
        client.submit(head | {"spec": wrong})
    with pytest.raises(ManifestError, match="metadata"):
        client.submit(SPEC)
    with pytest.raises(FineTuneError, match="no-such-file"):
        client.submit("no-such-file.yaml")


def test_two_jobs_with_one_output_are_one_too_many(client):
    same = SPEC.model_copy(update={"output": SPEC.output.model_copy(update={"uri": "s3://adapters/x"})})
    client.submit(same, name="a")
    with pytest.raises(FineTuneError, match="is where job a"):
        client.submit(same, name="b")


def test_waiting_ends_with_the_job_and_the_adapter_is_fetched(client, put, kube, tmp_path):
    digest = adapter(tmp_path / "published")
    put(states.job("nli"), states.training())
    seen: list[FineTuneJobStatus] = []
    done = states.succeeded(f"file://{tmp_path}/published", digest)

    def end() -> None:
        wait_until(lambda: seen, "the wait has begun")
        kube.patch("FineTuneJob", "nli", {"status": done}, subresource="status")

    thread = threading.Thread(target=end)
    thread.start()
    run = client.get("nli")
    status = run.wait(timeout=60, on_change=seen.append)
    thread.join()
    assert seen[0].phase == "Training" and seen[-1] == status
    assert status.adapter and status.adapter.manifest_digest == digest
    assert run.download(tmp_path / "mine") == tmp_path / "mine"
    assert (tmp_path / "mine" / "adapter_config.json").read_bytes() == b"{}"
    assert list(run.logs()) == ["12:00:00  Training on 4 rows"]
    adapter(tmp_path / "published", more=b"changed")
    with pytest.raises(FineTuneError, match="no longer holds"):
        run.download(tmp_path / "other")


def test_a_failure_and_a_long_wait_are_errors_of_their_own(client, put):
    put(states.job("bad"), states.failed("DatasetInvalid", "train.jsonl:2: no text", 65))
    with pytest.raises(JobFailed, match=r"bad failed: .*train\.jsonl:2") as caught:
        client.get("bad").wait()
    assert caught.value.status.attempts and caught.value.hint
    put(states.job("slow", output={"uri": "s3://adapters/slow"}), states.training())
    with pytest.raises(TimeoutError, match="slow has not ended"):
        client.get("slow").wait(timeout=0.5)
    with pytest.raises(FineTuneError, match="no adapter"):
        client.get("slow").download("x")


def test_the_code_in_the_documentation_runs_from_top_to_bottom(cluster, kube, tmp_path, namespace, monkeypatch, capsys):
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    monkeypatch.chdir(tmp_path)
    submit, wait, fetch, several = (body.replace("research", namespace) for body in blocks(PAGE, "python"))
    names = {}
    exec(submit, names)
    spec = kube.get("FineTuneJob", "nli-rank32")["spec"]
    assert (spec["lora"]["rank"], spec["model"]["secretRef"]["name"]) == (32, "hf-token")
    digest = adapter(tmp_path / "published")
    done = states.succeeded(f"file://{tmp_path}/published", digest)
    kube.patch("FineTuneJob", "nli-rank32", {"status": done}, subresource="status")
    exec(wait, names)
    exec(fetch, names)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    exec(several, names)
    shown = capsys.readouterr().out
    for words in ("Succeeded step=3400", "evalLoss", "Training on 4 rows", "nli-rate-2 None"):
        assert words in shown
    left = {job["metadata"]["name"]: job["spec"] for job in kube.list("FineTuneJob", namespace)}
    assert set(left) == {"nli-rate-0", "nli-rate-1", "nli-rate-2"}
    assert [spec["training"]["learningRate"] for _, spec in sorted(left.items())] == [1e-4, 2e-4, 4e-4]
    assert left["nli-rate-0"]["lora"]["rank"] == 32
