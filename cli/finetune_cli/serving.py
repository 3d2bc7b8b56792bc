"""Kubernetes objects that serve a published adapter with vLLM; an init container fetches and verifies the adapter.

Everything is plain data, written by the YAML library: no value can break out of its place. Pure.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

Object = dict[str, Any]
#: What vLLM takes for --max-lora-rank.
RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
FOLDER: Final = "/adapters"
PORT: Final = 8000


class Platform(StrEnum):
    """What serves the adapter."""

    VLLM = "vllm"
    KSERVE = "kserve"
    AIBRIX = "aibrix"
    PRODUCTION_STACK = "production-stack"
    LLM_D = "llm-d"


@dataclass(frozen=True)
class Served:
    """One adapter to serve: `model` is what requests call it, `digest` the SHA-256 of its manifest."""

    model: str
    uri: str
    digest: str
    rank: int

    @property
    def version(self) -> str:
        """A name of this very adapter."""
        return f"{self.model}-{self.digest[:8]}"


@dataclass(frozen=True)
class Setup:
    """How adapters are served.

    Attributes:
        name: Name of the objects, and what requests call the adapter.
        base: The base model on the hub.
        revision: The commit that the adapter was trained on.
        image: vLLM's image.
        trainer_image: The trainer's image, whose `finetune download` fetches the adapter.
        secret: Secret with the object store's credentials, and FINETUNE_PUBLIC_KEY where signatures are checked.
        gpus: GPUs of one replica.
        replicas: Pods.
        gateway: Name of the Gateway, for llm-d.
        model_secret: Secret with the HF_TOKEN that may read the base model; KServe fetches that by itself.
    """

    name: str
    base: str
    revision: str | None
    image: str
    trainer_image: str
    secret: str | None
    gpus: int
    replicas: int
    gateway: str
    model_secret: str | None = None


def manifest(platform: Platform, setup: Setup, adapter: Served, canary: Served | None, percent: int) -> list[Object]:
    """Return the objects for one platform.

    Args:
        platform: What serves the adapter.
        setup: How.
        adapter: The adapter.
        canary: Another adapter of the same base that gets a share of the requests; llm-d only.
        percent: That share.
    """
    if platform is Platform.LLM_D:
        return _llm_d(setup, adapter, canary, percent)
    made: dict[Platform, Callable[[Setup, Served], list[Object]]] = {
        Platform.VLLM: _vllm,
        Platform.KSERVE: _kserve,
        Platform.AIBRIX: _aibrix,
        Platform.PRODUCTION_STACK: _production_stack,
    }
    return made[platform](setup, adapter)


def max_rank(ranks: Sequence[int]) -> int | None:
    """Return the least --max-lora-rank that holds all; None if vLLM has none."""
    return next((each for each in RANKS if each >= max(ranks)), None)


def _lora_arguments(adapters: Sequence[Served], names: Sequence[str]) -> list[str]:
    modules = [f"{name}={FOLDER}/{each.version}" for name, each in zip(names, adapters, strict=True)]
    loras = str(len(adapters))
    return ["--max-lora-rank", str(max_rank([each.rank for each in adapters])), "--max-loras", loras] + (
        ["--lora-modules", *modules] if modules else []
    )


def _init_containers(setup: Setup, adapters: Sequence[Served]) -> list[Object]:
    """Return one container for each adapter: it ends well only if every byte is the published one."""
    credentials = {"envFrom": [{"secretRef": {"name": setup.secret}}]} if setup.secret else {}
    return [
        {
            "name": f"fetch-{each.digest[:8]}",
            "image": setup.trainer_image,
            "command": ["finetune", "download", each.uri, f"{FOLDER}/{each.version}"],
            "args": ["--digest", f"sha256:{each.digest}", "--overwrite"],
            **credentials,
            "env": [{"name": "HOME", "value": FOLDER}],
            "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
            },
            "volumeMounts": [{"name": "adapters", "mountPath": FOLDER}],
        }
        for each in adapters
    ]


def _pod(setup: Setup, adapters: Sequence[Served], extra: Sequence[str], env: Sequence[Object] = ()) -> Object:
    revision = ["--revision", setup.revision, "--tokenizer-revision", setup.revision] if setup.revision else []
    parallel = ["--tensor-parallel-size", str(setup.gpus)] if setup.gpus > 1 else []
    probe = {"httpGet": {"path": "/health", "port": "http"}}
    if setup.model_secret:
        token = {"name": setup.model_secret, "key": "HF_TOKEN"}
        env = [*env, {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}}]
    return {
        "initContainers": _init_containers(setup, adapters),
        "containers": [
            {
                "name": "vllm",
                "image": setup.image,
                "command": ["vllm", "serve", setup.base, *revision, "--port", str(PORT), "--enable-lora"],
                "args": [*parallel, *extra],
                **({"env": list(env)} if env else {}),
                "ports": [{"name": "http", "containerPort": PORT}],
                "startupProbe": probe | {"periodSeconds": 10, "failureThreshold": 180},
                "readinessProbe": probe | {"periodSeconds": 5},
                "livenessProbe": probe | {"periodSeconds": 10, "failureThreshold": 6},
                "resources": {"limits": {"nvidia.com/gpu": setup.gpus}},
                "volumeMounts": [
                    {"name": "adapters", "mountPath": FOLDER, "readOnly": True},
                    {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - vLLM's processes talk there
                ],
            }
        ],
        "volumes": [{"name": "adapters", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}],
        "securityContext": {"fsGroup": 65532},
    }


def _deployment(setup: Setup, name: str, labels: dict[str, str], pod: Object) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": setup.replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def _service(name: str, labels: dict[str, str], selector: dict[str, str]) -> Object:
    port = {"name": "http", "port": PORT, "targetPort": "http"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {"selector": selector, "ports": [port]},
    }


def _vllm(setup: Setup, adapter: Served) -> list[Object]:
    labels = {"app.kubernetes.io/name": "vllm", "app.kubernetes.io/instance": setup.name}
    pod = _pod(setup, [adapter], _lora_arguments([adapter], [adapter.model]))
    return [_deployment(setup, setup.name, labels, pod), _service(setup.name, labels, labels)]


def _kserve(setup: Setup, adapter: Served) -> list[Object]:
    """KServe's own container starts vLLM on what it fetched of model.uri; it takes more arguments from a variable."""
    source = f"hf://{setup.base}" + (f":{setup.revision}" if setup.revision else "")
    arguments = shlex.join(["--enable-lora", *_lora_arguments([adapter], [adapter.model])])
    template = {
        "initContainers": _init_containers(setup, [adapter]),
        "containers": [
            {
                "name": "main",
                "env": [{"name": "VLLM_ADDITIONAL_ARGS", "value": arguments}],
                "resources": {"limits": {"nvidia.com/gpu": str(setup.gpus)}},
                "volumeMounts": [{"name": "adapters", "mountPath": FOLDER, "readOnly": True}],
            }
        ],
        "volumes": [{"name": "adapters", "emptyDir": {}}],
    }
    spec = {
        "model": {"uri": source, "name": setup.base},
        "replicas": setup.replicas,
        "parallelism": {"tensor": setup.gpus},
        "router": {"gateway": {}, "route": {}, "scheduler": {}},
        "template": template,
    }
    kind = {"apiVersion": "serving.kserve.io/v1alpha2", "kind": "LLMInferenceService"}
    return [{**kind, "metadata": {"name": setup.name}, "spec": spec}]


_RUNTIME_UPDATES: Final = {"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "True"}


def _aibrix(setup: Setup, adapter: Served) -> list[Object]:
    """AIBrix loads the adapter into its pods, from the folder that the init container filled."""
    base = f"{setup.name}-base"
    labels = {"model.aibrix.ai/name": base, "adapter.model.aibrix.ai/enabled": "true"}
    extra = ["--served-model-name", base, *_lora_arguments([adapter], [adapter.model])[:4]]
    service_labels = {"model.aibrix.ai/name": base, "model.aibrix.ai/port": str(PORT)}
    return [
        _deployment(setup, base, labels, _pod(setup, [adapter], extra, [_RUNTIME_UPDATES])),
        _service(base, service_labels, labels),
        {
            "apiVersion": "model.aibrix.ai/v1alpha1",
            "kind": "ModelAdapter",
            "metadata": {
                "name": setup.name,
                "labels": {"model.aibrix.ai/name": setup.name, "model.aibrix.ai/port": str(PORT)},
            },
            "spec": {
                "baseModel": base,
                "podSelector": {"matchLabels": labels},
                "artifactURL": f"{FOLDER}/{adapter.version}",
                "schedulerName": "default",
            },
        },
    ]


def _production_stack(setup: Setup, adapter: Served) -> list[Object]:
    """Its LoRA controller finds pods by the label `model`, and loads adapters from folders in them."""
    base = f"{setup.name}-base"
    labels = {"model": base, "environment": "router"}
    extra = ["--served-model-name", base, *_lora_arguments([adapter], [adapter.model])[:4]]
    return [
        _deployment(setup, base, labels, _pod(setup, [adapter], extra, [_RUNTIME_UPDATES])),
        _service(base, labels, labels),
        {
            "apiVersion": "production-stack.vllm.ai/v1alpha1",
            "kind": "LoraAdapter",
            "metadata": {"name": setup.name},
            "spec": {
                "baseModel": base,
                "adapterSource": {
                    "type": "local",
                    "adapterName": adapter.model,
                    "adapterPath": f"{FOLDER}/{adapter.version}",
                },
                "loraAdapterDeploymentConfig": {"algorithm": "default"},
            },
        },
    ]


def _llm_d(setup: Setup, adapter: Served, canary: Served | None, percent: int) -> list[Object]:
    """Adapters are served by names of their versions; a rewrite maps the name that clients use, by weight."""
    adapters = [adapter, *([canary] if canary else [])]
    labels = {"llm-d.ai/model": setup.name}
    pod = _pod(setup, adapters, _lora_arguments(adapters, [each.version for each in adapters]))
    pool = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": setup.name}
    targets: list[Object] = [{"modelRewrite": adapter.version}]
    if canary:
        targets = [
            {"modelRewrite": adapter.version, "weight": 100 - percent},
            {"modelRewrite": canary.version, "weight": percent},
        ]
    return [
        _deployment(setup, setup.name, labels, pod),
        {
            "apiVersion": "inference.networking.k8s.io/v1",
            "kind": "InferencePool",
            "metadata": {"name": setup.name},
            "spec": {
                "selector": {"matchLabels": labels},
                "targetPorts": [{"number": PORT}],
                "endpointPickerRef": {"name": f"{setup.name}-epp", "port": {"number": 9002}},
            },
        },
        {
            "apiVersion": "llm-d.ai/v1alpha2",
            "kind": "InferenceModelRewrite",
            "metadata": {"name": setup.name},
            "spec": {
                "poolRef": pool,
                "rules": [
                    {"matches": [{"model": {"type": "Exact", "value": adapter.model}}], "targets": targets},
                ],
            },
        },
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": setup.name},
            "spec": {
                "parentRefs": [{"name": setup.gateway}],
                "rules": [
                    {"matches": [{"path": {"type": "PathPrefix", "value": "/"}}], "backendRefs": [pool]},
                ],
            },
        },
    ]
