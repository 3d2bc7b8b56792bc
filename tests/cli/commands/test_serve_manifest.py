"""serve-manifest prints whole objects, pinned to one adapter, and refuses what vLLM would not serve."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
import yaml

from finetune_cli.serving import Platform, Served, Setup, manifest, max_rank
from support.cli.run import finetune, no_traceback
from support.common import kubernetes_schema

COMMIT, SHA = "c" * 40, "0f3c9a77" + "0" * 56
ADAPTER = Served("nli", "s3://adapters/nli", SHA, 16)
OTHER = Served("nli", "s3://adapters/nli/run-8", "1e2d" + "1" * 60, 24)
SETUP = Setup("nli", "org/base", COMMIT, "vllm/vllm-openai:v1", "trainer:1", "s3-read", 2, 3, "inference-gateway")
BUILT_IN = {"Deployment", "Service"}
#: What each platform is told, by kind. The schemas are not ours to keep: each platform's
#: CustomResourceDefinition took these objects when this was written.
OWN: dict[Platform, dict[str, Any]] = {
    Platform.VLLM: {},
    Platform.KSERVE: {
        "LLMInferenceService": {
            "model": {"uri": f"hf://org/base:{COMMIT}", "name": "org/base"},
            "replicas": 3,
            "parallelism": {"tensor": 2},
            "router": {"gateway": {}, "route": {}, "scheduler": {}},
        }
    },
    Platform.AIBRIX: {
        "ModelAdapter": {
            "baseModel": "nli-base",
            "podSelector": {
                "matchLabels": {"model.aibrix.ai/name": "nli-base", "adapter.model.aibrix.ai/enabled": "true"}
            },
            "artifactURL": "/adapters/nli-0f3c9a77",
            "schedulerName": "default",
        }
    },
    Platform.PRODUCTION_STACK: {
        "LoraAdapter": {
            "baseModel": "nli-base",
            "adapterSource": {"type": "local", "adapterName": "nli", "adapterPath": "/adapters/nli-0f3c9a77"},
            "loraAdapterDeploymentConfig": {"algorithm": "default"},
        }
    },
    Platform.LLM_D: {
        "InferencePool": {
            "selector": {"matchLabels": {"llm-d.ai/model": "nli"}},
            "targetPorts": [{"number": 8000}],
            "endpointPickerRef": {"name": "nli-epp", "port": {"number": 9002}},
        },
        "InferenceModelRewrite": {
            "poolRef": {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "nli"},
            "rules": [
                {
                    "matches": [{"model": {"type": "Exact", "value": "nli"}}],
                    "targets": [{"modelRewrite": "nli-0f3c9a77"}],
                }
            ],
        },
        "HTTPRoute": {
            "parentRefs": [{"name": "inference-gateway"}],
            "rules": [
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
                    "backendRefs": [{"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "nli"}],
                }
            ],
        },
    },
}


def init_containers(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    specs = [each["spec"].get("template", {}) for each in objects]
    return [found for spec in specs for found in spec.get("spec", spec).get("initContainers", [])]


@pytest.mark.parametrize("platform", list(Platform))
def test_objects_are_whole_and_pinned_to_one_adapter(platform: Platform) -> None:
    objects = manifest(platform, SETUP, ADAPTER, None, 10)
    own = OWN[platform]
    assert {each["kind"] for each in objects} - BUILT_IN == set(own)
    for each in objects:
        if each["kind"] in BUILT_IN:
            kubernetes_schema.check(each)
        else:
            assert own[each["kind"]].items() <= each["spec"].items()
    [fetch] = init_containers(objects)
    assert fetch["command"] == ["finetune", "download", "s3://adapters/nli", "/adapters/nli-0f3c9a77"]
    assert fetch["args"] == ["--digest", f"sha256:{SHA}", "--overwrite"]
    assert fetch["envFrom"] == [{"secretRef": {"name": "s3-read"}}]
    text = yaml.safe_dump_all(objects)
    assert list(yaml.safe_load_all(text)) == objects
    assert COMMIT in text


@pytest.mark.parametrize("platform", [Platform.VLLM, Platform.AIBRIX, Platform.PRODUCTION_STACK])
def test_services_lead_to_the_pods(platform: Platform) -> None:
    found = {each["kind"]: each for each in manifest(platform, SETUP, ADAPTER, None, 10)}
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"].items() <= labels.items()
    [container] = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert {"org/base", "--revision", COMMIT, "--enable-lora"} <= {*container["command"]}
    assert container["args"][:2] == ["--tensor-parallel-size", "2"]
    assert container["args"][-1] == ("nli=/adapters/nli-0f3c9a77" if platform is Platform.VLLM else "1")


def test_a_canary_gets_its_share_of_one_name() -> None:
    objects = manifest(Platform.LLM_D, SETUP, ADAPTER, OTHER, 5)
    rewrite = next(each for each in objects if each["kind"] == "InferenceModelRewrite")
    assert rewrite["spec"]["rules"][0]["targets"] == [
        {"modelRewrite": "nli-0f3c9a77", "weight": 95},
        {"modelRewrite": "nli-1e2d1111", "weight": 5},
    ]
    [container] = objects[0]["spec"]["template"]["spec"]["containers"]
    assert container["args"][2:] == [
        "--max-lora-rank", "32", "--max-loras", "2",
        "--lora-modules", "nli-0f3c9a77=/adapters/nli-0f3c9a77", "nli-1e2d1111=/adapters/nli-1e2d1111",
    ]  # fmt: skip
    assert len(init_containers(objects)) == 2
    kubernetes_schema.check(objects[0])


@pytest.mark.parametrize("platform", [each for each in Platform if each is not Platform.KSERVE])
def test_a_gated_base_model_is_read_with_the_token_of_a_secret(platform: Platform) -> None:
    objects = manifest(platform, replace(SETUP, model_secret="hf-token"), ADAPTER, None, 10)
    [container] = objects[0]["spec"]["template"]["spec"]["containers"]
    assert {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "HF_TOKEN"}},
    } in container["env"]
    assert "hf-token" not in json.dumps(init_containers(objects))
    kubernetes_schema.check(objects[0])


@pytest.mark.parametrize(("ranks", "most"), [([1], 8), ([16], 16), ([17, 4], 32), ([512], 512), ([513], None)])
def test_the_rank_is_one_that_vllm_takes(ranks: list[int], most: int | None) -> None:
    assert max_rank(ranks) == most


@pytest.fixture
def serve(s3: Any, bucket: str) -> Any:
    """Publish an adapter with this config and manifest, and run the command on it."""

    def run(*arguments: str, config: dict[str, Any] | None = None, **changes: Any) -> Any:
        data = json.dumps({"r": 16} | (config or {})).encode()
        records = [{"path": "adapter_config.json", "sizeBytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]
        body = {"schemaVersion": 1, "kind": "Adapter", "createdAt": "2026-01-01T00:00:00Z", "files": records}
        body |= {"baseModel": "org/base", "baseCommit": COMMIT, "rank": 16, "job": {"name": "nli"}} | changes
        for name, text in (("adapter_config.json", data), ("manifest.json", json.dumps(body).encode())):
            s3.client().put_object(Bucket=bucket, Key=f"nli/{name}", Body=text)
        return no_traceback(finetune("serve-manifest", f"s3://{bucket}/nli", *arguments, env=s3.env))

    return run


def test_the_printed_yaml_is_of_the_published_adapter(serve: Any, bucket: str) -> None:
    done = serve("--secret", "s3-read")
    assert done.returncode == 0, done.stderr
    deployment, service = yaml.safe_load_all(done.stdout)
    assert (deployment["metadata"]["name"], service["metadata"]["name"]) == ("nli", "nli")
    assert f"s3://{bucket}/nli" in deployment["spec"]["template"]["spec"]["initContainers"][0]["command"]


@pytest.mark.parametrize(
    ("arguments", "changes", "sentence"),
    [
        ([], {"config": {"use_dora": True}}, "does not serve adapters with use_dora"),
        ([], {"config": {"bias": "all"}}, "does not serve adapters with bias"),
        ([], {"config": {"modules_to_save": ["lm_head"]}}, "does not serve adapters with modules_to_save"),
        ([], {"rank": 1024}, "does not serve adapters of rank 1024"),
        ([], {"baseModel": "s3://models/base"}, "cannot load by that name"),
        ([], {"baseModel": "--trust-remote-code"}, "cannot load by that name"),
        ([], {"baseCommit": "--trust-remote-code"}, "is no commit of org/base"),
        (["--name", "$(X)\nevil: 1"], {}, "must be at most 50 lowercase"),
        (["--canary", "s3://b/c"], {}, "--canary needs --for llm-d"),
        (["--for", "kserve", "--model-secret", "hf"], {}, "KServe fetches the base model itself"),
    ],
)
def test_what_cannot_be_served_is_refused(serve: Any, arguments: list[str], changes: Any, sentence: str) -> None:
    done = serve(*arguments, **changes)
    assert done.returncode in (1, 5)
    assert done.stdout == ""
    assert sentence in " ".join(done.stderr.split())
