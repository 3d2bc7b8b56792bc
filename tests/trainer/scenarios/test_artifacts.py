"""A run that makes a merged model of its adapter, besides, and pushes it to a registry and a hub, or tells why not.

Registry and hub are stand-ins; test_oci.py asks a real registry where there is one.
"""

import hashlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.publishing.artifacts.merged import MergedArtifact
from support.cli.run import finetune
from support.stores.hub import Hub, hub_server
from support.stores.registry import Registry, standin_registry
from support.trainer.process import Finished, job, train

WANTED: dict[str, Any] = {"output.artifacts": ["merged", "oci", "hf"], "output.hf": {"uri": "hf://me/{name}"}}
TOKEN = "hf_may_write_here"


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with standin_registry() as found:
        yield found


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hub_server() as found:
        found.writer, found.folder = TOKEN, tmp_path_factory.mktemp("repositories")
        yield found


def start(
    folder: Path, model: Path, registry: Registry, hub: Hub, process: Path, image: str = "{name}:v1", **options: Any
) -> Finished:
    """Run a job that wants all of them, with the logins of registry and hub in its Secrets."""
    (process / "secrets" / "hf").mkdir(parents=True)
    (process / "secrets" / "hf" / "HF_TOKEN").write_text(TOKEN)
    (process / "secrets" / "hf" / "HF_ENDPOINT").write_text(hub.endpoint)
    (process / "secrets" / "oci").mkdir(parents=True)
    (process / "secrets" / "oci" / ".dockerconfigjson").write_text(registry.docker_config())
    config = job(folder, model, WANTED | {"output.oci": {"uri": registry.uri(f"team/{image}")}}, uid="1234")
    return train(config, process, **options)


@pytest.fixture(scope="module")
def run(
    tiny_model: Path, registry: Registry, hub: Hub, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Finished, Path]:
    folder = tmp_path_factory.mktemp("run")
    return start(folder, tiny_model, registry, hub, folder / "process"), folder


def test_the_merged_model_is_published_beside_the_adapter(run: tuple[Finished, Path]) -> None:
    done, folder = run
    assert done.exit_code == 0, done.log
    assert done.message.endswith("and was loaded back; merged and oci and hf beside it")
    merged, *_ = done.report["artifacts"]
    data = (folder / "out/merged/manifest.json").read_bytes()
    manifest = json.loads(data)
    assert merged["name"] == "merged"
    assert merged["uri"] == f"file://{folder}/out/merged"
    assert merged["manifestDigest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert manifest["kind"] == "Merged"
    assert {"config.json", "model.safetensors", "tokenizer.json", "training/job.yaml", "README.md"} <= {
        file["path"] for file in manifest["files"]
    }
    assert abs(merged["loss"] - merged["adapterLoss"]) < 0.02
    assert manifest["metrics"]["mergedLoss"] == merged["loss"]
    adapter = json.loads((folder / "out/manifest.json").read_text())
    assert not [file for file in adapter["files"] if file["path"].startswith("merged/")]


def test_the_adapter_is_pushed_and_can_be_pulled(
    run: tuple[Finished, Path], registry: Registry, tmp_path: Path
) -> None:
    done, folder = run
    _, image, _ = done.report["artifacts"]
    assert image["uri"] == registry.uri("team/tiny:v1")
    assert image["loss"] == image["adapterLoss"]
    got = finetune("download", image["uri"], str(tmp_path / "got"), env=registry.login(tmp_path / "docker"))
    assert got.returncode == 0, got.stderr
    weights = "adapter_model.safetensors"
    assert (tmp_path / "got" / weights).read_bytes() == (folder / "out" / weights).read_bytes()
    digest = hashlib.sha256((tmp_path / "got" / "manifest.json").read_bytes()).hexdigest()
    assert image["manifestDigest"] == f"sha256:{digest}"
    denied = finetune("download", image["uri"], str(tmp_path / "other"), env={"DOCKER_CONFIG": str(tmp_path)})
    assert denied.returncode == 3
    assert "access to read is denied (HTTP 401)" in denied.stderr


def test_the_adapter_is_pushed_to_a_private_repository_of_the_hub(run: tuple[Finished, Path], hub: Hub) -> None:
    done, folder = run
    *_, pushed = done.report["artifacts"]
    repository = hub.repositories["me/tiny"]
    assert (pushed["name"], pushed["uri"], repository.token) == ("hf", "hf://me/tiny", TOKEN)
    files = repository.files()
    weights = "adapter_model.safetensors"
    assert files[weights].read_bytes() == (folder / "out" / weights).read_bytes()
    assert pushed["manifestDigest"] == f"sha256:{hashlib.sha256(files['manifest.json'].read_bytes()).hexdigest()}"
    assert pushed["loss"] == pushed["adapterLoss"]
    assert TOKEN not in done.log + json.dumps(done.report)


def test_transformers_alone_finds_the_same_loss(run: tuple[Finished, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done, folder = run
    model = AutoModelForCausalLM.from_pretrained(folder / "out/merged", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder / "out/merged")
    total, count = 0.0, 0
    for line in (folder / "eval.jsonl").read_text().splitlines()[:8]:
        ids = tokenizer(json.loads(line)["text"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert abs(total / count - done.report["artifacts"][0]["loss"]) < 0.02


def test_a_merged_model_can_be_downloaded_and_is_no_adapter_to_chat_with(
    run: tuple[Finished, Path], tmp_path: Path
) -> None:
    merged = f"file://{run[1]}/out/merged"
    got = finetune("download", merged, str(tmp_path / "got"))
    assert got.returncode == 0, got.stderr
    assert (tmp_path / "got/model.safetensors").is_file()
    refused = finetune("chat", merged, "--once", "?")
    assert refused.returncode == 1
    assert f"{merged} holds a Merged, not an adapter" in refused.stderr


def test_another_attempt_reports_what_there_is(
    run: tuple[Finished, Path], registry: Registry, hub: Hub, tiny_model: Path, tmp_path: Path
) -> None:
    again = start(run[1], tiny_model, registry, hub, tmp_path / "again")
    assert again.report["artifacts"] == run[0].report["artifacts"]
    (run[1] / "out/merged/manifest.json").rename(tmp_path / "moved")
    try:
        [missing, *_] = start(run[1], tiny_model, registry, hub, tmp_path / "third").report["artifacts"]
    finally:
        (tmp_path / "moved").rename(run[1] / "out/merged/manifest.json")
    assert missing == {"name": "merged", "message": "the attempt that published the adapter ended before it was made"}


def test_exports_that_fail_leave_the_adapter_alone(
    tiny_model: Path, registry: Registry, hub: Hub, tmp_path: Path
) -> None:
    def break_the_merge() -> None:
        from safetensors.torch import load_file, save_file

        build = MergedArtifact.build

        def broken(self: MergedArtifact, trained: Any, folder: Path) -> None:
            build(self, trained, folder)
            weights = load_file(folder / "model.safetensors")
            save_file({name: each * 1.5 for name, each in weights.items()}, folder / "model.safetensors")

        MergedArtifact.build = broken  # type: ignore[method-assign]

    registry.faults.append(("PUT", "/manifests/broken", 405))
    done = start(tmp_path, tiny_model, registry, hub, tmp_path / "process", "other:broken", before=break_the_merge)
    assert done.exit_code == 0, done.log
    merged, image, pushed = done.report["artifacts"]
    assert pushed["uri"] == "hf://me/tiny"
    assert image["message"].endswith("team/other: the registry refuses it (HTTP 405, UNKNOWN)")
    assert "uri" not in image
    assert "uri" not in merged
    assert merged["message"].startswith("The merged model at hand, loaded back, has loss ")
    assert "merged failed: The merged model at hand" in done.message
    assert (tmp_path / "out/manifest.json").is_file()
    assert not (tmp_path / "out/merged/manifest.json").exists()


def test_an_adapter_published_before_is_exported_by_the_command(run: tuple[Finished, Path], tmp_path: Path) -> None:
    source, target = str(run[1] / "out"), tmp_path / "merged"
    made = finetune("export", source, str(target), "--to", "merged")
    assert made.returncode == 0, made.stderr
    assert f"merged published at file://{target}" in made.stdout
    before, *_ = run[0].report["artifacts"]
    metrics = json.loads((target / "manifest.json").read_text())["metrics"]
    assert metrics["mergedLoss"] == pytest.approx(before["loss"], abs=1e-6)
    assert (target / "model.safetensors").read_bytes() == (run[1] / "out/merged/model.safetensors").read_bytes()
    theirs = json.loads((target / "manifest.json").read_text()) | {"job": {"name": "other", "uid": "other"}}
    (target / "manifest.json").write_text(json.dumps(theirs))
    taken = finetune("export", source, str(target))
    assert taken.returncode == 1
    assert "already holds an adapter (of other" in taken.stderr
    gone = finetune("export", source, str(tmp_path / "other"), "--rows", "nowhere.jsonl")
    assert "nowhere.jsonl: no such file" in gone.stderr


@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed: make test installs it")
def test_the_command_makes_a_gguf_file(run: tuple[Finished, Path], tmp_path: Path) -> None:
    target = tmp_path / "gguf"
    made = finetune("export", str(run[1] / "out"), str(target), "--to", "gguf", "--quantization", "q4_0")
    assert made.returncode == 0, made.stderr
    manifest = json.loads((target / "manifest.json").read_text())
    assert {"model.gguf", "Modelfile", "README.md", "training/job.yaml"} <= {each["path"] for each in manifest["files"]}
    assert manifest["kind"] == "Gguf"
    assert abs(manifest["metrics"]["ggufLoss"] - run[0].report["artifacts"][0]["adapterLoss"]) < 0.1


def test_the_command_pushes_an_image(run: tuple[Finished, Path], registry: Registry, tmp_path: Path) -> None:
    image = registry.uri("team/later:v1")
    login = registry.login(tmp_path / "docker")
    made = finetune("export", str(run[1] / "out"), image, "--to", "oci", env=login)
    assert made.returncode == 0, made.stderr
    assert f"oci published at {image}" in made.stdout
    refused = finetune("export", str(run[1] / "out"), str(tmp_path), "--to", "oci")
    assert refused.returncode == 1
    assert f"{tmp_path} is no oci:// URI, which --to oci needs" in refused.stderr


def test_a_merged_model_goes_to_a_bucket(run: tuple[Finished, Path], s3: Any, bucket: str, tmp_path: Path) -> None:
    uri = f"s3://{bucket}/merged"
    made = finetune("export", str(run[1] / "out"), uri, env=s3.env)
    assert made.returncode == 0, made.stderr
    got = finetune("download", uri, str(tmp_path / "got"), env=s3.env)
    assert got.returncode == 0, got.stderr
    assert (tmp_path / "got/model.safetensors").read_bytes() == (run[1] / "out/merged/model.safetensors").read_bytes()


def test_a_merge_by_the_command_that_computes_something_else_is_not_published(
    run: tuple[Finished, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.publishing.artifacts import merged

    monkeypatch.setattr(merged, "TOLERANCE", 0.0)
    said = finetune("export", str(run[1] / "out"), str(tmp_path / "merged"))
    assert said.returncode == 5
    assert "The merged model at hand, loaded back, has loss" in said.stderr
    assert not list((tmp_path / "merged").glob("*.safetensors"))
