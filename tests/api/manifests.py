"""One table of accepted and refused manifests, tried against the pydantic models and against an API server."""

import copy
from dataclasses import dataclass, field
from typing import Any

REMOVE = object()
HEX = "0123456789abcdef0123456789abcdef01234567"

MINIMAL: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "nli", "namespace": "default"},
    "spec": {
        "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
        "dataset": {"train": "s3://data/nli/train_ft.jsonl"},
        "output": {"uri": "s3://adapters/nli"},
    },
}


@dataclass(frozen=True)
class Case:
    """`changes` (dotted path -> value) on MINIMAL. Refused when `field` is set: the answer names it and says `says`.

    `server_says` is given where the API server's own words differ: lengths, and types that a text or a number may have.
    """

    id: str
    changes: dict[str, Any] = field(default_factory=dict)
    field: str | None = None
    says: str = ""
    server_says: str | None = None

    def manifest(self) -> dict[str, Any]:
        document = copy.deepcopy(MINIMAL)
        for path, value in self.changes.items():
            *parents, last = path.split(".")
            target = document
            for key in parents:
                target = target.setdefault(key, {})
            if value is REMOVE:
                target.pop(last)
            else:
                target[last] = value
        return document


def nested(levels: int) -> dict[str, Any]:
    """An object in an object in an object…"""
    found: dict[str, Any] = {}
    for _ in range(levels):
        found = {"a": found}
    return found


def _accepted(name: str, changes: dict[str, Any] | None = None) -> Case:
    return Case(name, changes or {})


def _refused(name: str, changes: dict[str, Any], blamed: str, says: str, server_says: str | None = None) -> Case:
    return Case(name, changes, blamed, says, server_says)


_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"
_NODES = f"spec.resources.affinity.nodeAffinity.{_REQUIRED}.nodeSelectorTerms"
_TERM = {
    "topologyKey": "topology.kubernetes.io/zone",
    "labelSelector": {"matchLabels": {"app": "web"}, "matchExpressions": [{"key": "tier", "operator": "Exists"}]},
    "namespaces": ["default"],
    "namespaceSelector": {},
    "matchLabelKeys": ["pod-template-hash"],
}
AFFINITY: dict[str, Any] = {
    "nodeAffinity": {
        _REQUIRED: {
            "nodeSelectorTerms": [
                {
                    "matchExpressions": [{"key": "gpu", "operator": "NotIn", "values": ["t4", "p4"]}],
                    "matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-1"]}],
                }
            ]
        },
        _PREFERRED: [
            {"weight": 1, "preference": {"matchExpressions": [{"key": "ram", "operator": "Gt", "values": ["9"]}]}}
        ],
    },
    "podAffinity": {_REQUIRED: [_TERM], _PREFERRED: [{"weight": 100, "podAffinityTerm": _TERM}]},
    "podAntiAffinity": {_REQUIRED: [{"topologyKey": "kubernetes.io/hostname", "mismatchLabelKeys": ["app"]}]},
}


def _expressions(*values: int) -> list[dict[str, Any]]:
    """An expression with so many values, for each number given."""
    return [{"key": "zone", "operator": "In", "values": [f"z{index}" for index in range(count)]} for count in values]


_EVAL = {"spec.dataset.eval": "s3://data/nli/test_ft.jsonl"}
_MULTIPLE = "must be a multiple of microBatchSize"
_NAME = "must be at most 50 lowercase letters, digits and dashes, a letter first"
_OBJECT_NAME = "must be the name of a Kubernetes object: lowercase letters"
_QUANTITY = 'must be a quantity such as 4, "1.5", 500m, 16G or 16Gi'
_CREDENTIALS = "must not hold credentials: put them in a Secret"

ACCEPTED = [
    _accepted("only model, dataset and output"),
    _accepted("hub model at a pull request", {"spec.model.revision": "refs/pr/1"}),
    _accepted("hub model at a tag", {"spec.model.revision": "v0.3"}),
    _accepted("model in a bucket", {"spec.model.source": "s3://models/mistral/7b"}),
    _accepted("model on a volume", {"spec.model.source": "pvc://models/mistral-7b"}),
    _accepted("model in the image", {"spec.model.source": "file:///opt/models/mistral"}),
    _accepted("data set of the hub", {"spec.dataset.train": "hf://datasets/nyu-mll/multi_nli"}),
    _accepted("prefix of many shards", {"spec.dataset.train": "s3://data/nli/shards/"}),
    _accepted("key in French with a space", {"spec.dataset.train": "s3://data/données/train set.jsonl"}),
    _accepted("keys in other scripts", {
        "spec.dataset": {"train": "s3://data/数据/обучение (1).jsonl", "eval": "s3://data/داده‌ها/हिन्दी!"},
    }),
    _accepted("percent signs as they are", {"spec.dataset.train": "s3://data/a%20b/100%.jsonl"}),
    _accepted("space in a path", {"spec.output.uri": "s3://adapters/my job", "spec.model.source": "file:///my models/7b"}),
    _accepted("key with an at sign", {"spec.dataset.train": "s3://data/nli/a@b"}),
    _accepted("key with a colon and an at sign", {"spec.dataset.train": "s3://data/nli/a:b@c"}),
    _accepted("path with a colon and an at sign", {"spec.model.source": "file:///models@1/a:b@c"}),
    _accepted("volume path with a colon and an at sign", {"spec.model.source": "pvc://models/a:b@c"}),
    _accepted("hub file with a colon and an at sign", {"spec.dataset.train": "hf://datasets/me/nli/a:b@c"}),
    _accepted("several sources", {
        "spec.dataset": {"sources": [{"uri": "s3://data/a"}, {"uri": "hf://datasets/b/c", "weight": 0.3}]},
    }),
    _accepted("part of the rows held out", {"spec.dataset.evalFraction": 0.05, "spec.evaluation.earlyStopping": {}}),
    _accepted("names that only begin alike", {"spec.output.uri": "s3://data/nli/train_ft", "spec.model.source": "s3://data/n"}),
    _accepted("the name in what is written", {"spec.output.uri": "s3://adapters/{name}", "spec.checkpoint.uri": "s3://adapters/a-{name} b/x"}),
    _accepted("checkpoints below the output", {"spec.checkpoint.uri": "s3://adapters/nli/steps"}),
    _accepted("rows of another format", {"spec.dataset": {"train": "s3://data/x", "format": "sharegpt", "loss": "all"}}),
    _accepted("columns of other names", {
        "spec.dataset.columns": {"prompt": "question", "completion": "answer", "tools": None},
    }),
    _accepted("template of a row", {"spec.dataset.template": "### {instruction}\n{{literal}} {my column}\n"}),
    _accepted("template by its name", {"spec.dataset.template": "{a}", "spec.dataset.format": "template"}),
    _accepted("secrets for every role", {
        "spec.model.secretRef": {"name": "hf-token"},
        "spec.dataset.secretRef": {"name": "data.key"},
        "spec.output.secretRef": {"name": "s3-key"},
        "spec.logging.wandb": {"project": "nli", "secretRef": {"name": "wandb"}},
    }),
    _accepted("trusted code at a pinned commit", {"spec.model.trustRemoteCode": True, "spec.model.revision": HEX}),
    _accepted("plain LoRA", {"spec.quantization.bits": 16}),
    _accepted("LLM.int8", {"spec.quantization.bits": 8}),
    _accepted("whole-number learning rate", {"spec.training.learningRate": 1}),
    _accepted("fractional epochs", {"spec.training.epochs": 0.5}),
    _accepted("steps instead of epochs", {"spec.training.maxSteps": 100}),
    _accepted("pinned micro-batch", {"spec.training.microBatchSize": 4}),
    _accepted("selective checkpointing", {"spec.training.gradientCheckpointing": "selective"}),
    _accepted(
        "pinned engine",
        {
            "spec.training.gradientCheckpointing": 12,
            "spec.training.compile": "disabled",
            "spec.training.cudaGraphs": "enabled",
            "spec.training.precision": "fp8",
            "spec.quantization.cachedLayers": 20,
        },
    ),
    _accepted("every linear layer", {"spec.lora.targetModules": ["all-linear"]}),
    _accepted("memory to plan with", {"spec.resources.gpuMemory": "80Gi"}),
    _accepted("layers by a pattern", {"spec.lora.targetPattern": r".*\.layers\.(1|2)\..*(q|v)_proj"}),
    _accepted("some layers", {"spec.lora.layersToTransform": [0, 31]}),
    _accepted("whole modules", {"spec.lora.modulesToSave": ["embed_tokens", "lm_head"]}),
    _accepted("new tokens", {"spec.dataset.addTokens": ["<a>", "<b>"], "spec.lora.embeddings": True}),
    _accepted("new tokens and whole modules", {"spec.dataset.addTokens": ["<a>"], "spec.lora.modulesToSave": ["wte"]}),
    _accepted("continuing an adapter", {"spec.lora.initFrom": "s3://adapters/earlier"}),
    _accepted("continuing an adapter of a similar name", {"spec.lora.initFrom": "s3://adapters/nli2/"}),
    _accepted("a gate", {
        **_EVAL,
        "spec.evaluation": {"metrics": ["loss", "nli"]},
        "spec.publish.onlyIf": [
            {"metric": "f1", "atLeast": 0.9},
            {"metric": "evalLoss", "atMost": 2},
            {"metric": "evalLoss", "betterThan": "s3://adapters/current"},
        ],
    }),
    _accepted("a gate against the prefix above", {**_EVAL, "spec.publish.onlyIf": [{"metric": "evalLoss", "betterThan": "s3://adapters"}]}),
    _accepted("early stopping with held-out rows", {**_EVAL, "spec.evaluation.earlyStopping": {}}),
    _accepted("early stopping on accuracy", {
        **_EVAL,
        "spec.evaluation": {"metrics": ["loss", "nli"], "earlyStopping": {"metric": "accuracy", "patience": 2}},
    }),
    _accepted("several nodes", {"spec.resources": {"nodes": 2, "gpusPerNode": 8}}),
    _accepted("no GPU", {"spec.resources.gpusPerNode": 0}),
    _accepted("quantities as number and text", {"spec.resources": {"cpu": 4, "memory": "64Gi", "sharedMemory": "1.5Gi"}}),
    _accepted("fraction of a core", {"spec.resources": {"cpu": "1.5"}}),
    _accepted("placement", {
        "spec.resources": {
            "nodeSelector": {"gpu": "h200"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "affinity": AFFINITY,
            "priorityClassName": "high",
            "runtimeClassName": "nvidia",
        }
    }),
    _accepted("affinity left empty", {"spec.resources.affinity": {"podAffinity": {}, "nodeAffinity": None}}),
    _accepted("as many values as an affinity may hold", {_NODES: [{"matchExpressions": _expressions(31, 31)}]}),
    _accepted("as long a key as a node label may have", {"spec.resources.nodeSelector": {f"{'k' * 253}/{'k' * 63}": "v" * 63}}),
    _accepted("shared cache", {"spec.cache": {"claimName": "model-cache"}}),
    _accepted("deadlines and clean-up", {
        "spec.activeDeadlineSeconds": 3600, "spec.pendingDeadlineSeconds": 600, "spec.ttlSecondsAfterFinished": 0,
    }),
    _accepted("suspended from the start", {"spec.suspend": True}),
    _accepted("checkpoints elsewhere", {"spec.checkpoint": {"everySteps": 50, "keep": 5, "uri": "s3://scratch/ckpt"}}),
    _accepted("own image", {"spec.image": "registry.example.com/team/trainer:1.2@sha256:" + "a" * 64}),
    _accepted("longest name", {"metadata.name": "a" * 50}),
    _accepted("section left empty", {"spec.lora": None}),
    _accepted("switch left empty", {"spec.suspend": None}),
    _accepted("default left empty", {"spec.training": {"batchSize": None, "learningRate": None, "microBatchSize": None}}),
    _accepted("optional fields left empty", {
        "spec.cache": None, "spec.image": None, "spec.dataset.eval": None, "spec.resources": {"cpu": None},
    }),
    _accepted("node label left empty", {"spec.resources.nodeSelector": {"gpu": "h200", "zone": None}}),
    _accepted("toleration with an empty key", {"spec.resources.tolerations": [{"key": None, "operator": "Exists"}]}),
    _accepted("whole numbers written with a point", {"spec.lora.rank": 16.0, "spec.activeDeadlineSeconds": 3600.0}),
    _accepted("a merged model besides", {"spec.output.artifacts": ["merged"]}),
    _accepted("an image besides", {"spec.output.artifacts": ["oci"], "spec.output.oci": {"uri": "oci://r.example.com:5000/team/{name}:V1.0", "secretRef": {"name": "login"}}}),
    _accepted("a repository besides", {"spec.output.artifacts": ["hf"], "spec.output.hf": {"uri": "hf://my-org/{name}", "secretRef": {"name": "writer"}}}),
    _accepted("a GGUF file besides", {"spec.output.artifacts": ["gguf"], "spec.output.gguf": {"quantization": "q4_0"}}),
    _accepted("labels stay", {"metadata.labels": {"kueue.x-k8s.io/queue-name": "team-a"}}),
]  # fmt: skip

REFUSED = [
    _refused("no rows", {"spec.dataset.train": REMOVE}, "spec.dataset.train", "must be given, or dataset.sources in its place"),
    _refused("rows in two ways", {"spec.dataset.sources": [{"uri": "s3://data/a"}]}, "spec.dataset.train", "must be given, or dataset.sources"),
    _refused("no sources", {"spec.dataset": {"sources": []}}, "spec.dataset.sources", "should have at least 1 item"),
    _refused("source of no weight", {"spec.dataset": {"sources": [{"uri": "s3://data/a", "weight": 0}]}}, "spec.dataset.sources", "should be greater than 0"),
    _refused("source of credentials", {"spec.dataset": {"sources": [{"uri": "s3://k:s@data/a"}]}}, "spec.dataset.sources", _CREDENTIALS),
    _refused("all rows held out", {"spec.dataset.evalFraction": 1}, "spec.dataset.evalFraction", "should be less than 1"),
    _refused("held-out rows in two ways", {**_EVAL, "spec.dataset.evalFraction": 0.1}, "spec.dataset.evalFraction", "must not be given beside dataset.eval"),
    _refused("another field in braces", {"spec.output.uri": "s3://adapters/{uid}"}, "spec.output.uri", "may hold {name}"),
    _refused("half a brace", {"spec.checkpoint.uri": "s3://adapters/{name"}, "spec.checkpoint.uri", "may hold {name}"),
    _refused("a bucket of that name", {"spec.output.uri": "s3://{name}/x"}, "spec.output.uri", "must be s3://bucket/key"),
    _refused("the name in what is read", {"spec.dataset.train": "s3://data/{name}"}, "spec.dataset.train", "must be hf://owner/name"),
    _refused("output onto the model", {"spec.model.source": "s3://adapters/nli/"}, "spec.output.uri", "must not be, hold or lie in model.source"),
    _refused("output in the model", {"spec.model.source": "s3://adapters"}, "spec.output.uri", "must not be, hold or lie in model.source"),
    _refused("output above the rows", {"spec.output.uri": "s3://data/nli/"}, "spec.output.uri", "must not be, hold or lie in dataset.train"),
    _refused("output in the held-out rows", {"spec.dataset.eval": "s3://adapters/"}, "spec.output.uri", "must not be, hold or lie in dataset.eval"),
    _refused("output onto a source", {"spec.dataset": {"sources": [{"uri": "s3://data/a"}, {"uri": "s3://adapters/nli"}]}}, "spec.output.uri", "must not be, hold or lie in a URI of dataset.sources"),
    _refused("checkpoints in the rows", {"spec.checkpoint.uri": "s3://data/nli"}, "spec.checkpoint.uri", "must not be, hold or lie in dataset.train"),
    _refused("checkpoints onto the output", {"spec.checkpoint.uri": "s3://adapters/nli/"}, "spec.checkpoint.uri", "must not be or hold output.uri"),
    _refused("checkpoints above the output", {"spec.checkpoint.uri": "s3://adapters"}, "spec.checkpoint.uri", "must not be or hold output.uri"),
    _refused("unknown format", {"spec.dataset.format": "csv"}, "spec.dataset.format", '"auto", "text", "prompt-completion"'),
    _refused("unknown loss", {"spec.dataset.loss": "answer"}, "spec.dataset.loss", '"assistant", "all"'),
    _refused("column of no format", {"spec.dataset.columns": {"question": "q"}}, "spec.dataset.columns", "must name columns of text, prompt, completion"),
    _refused("no columns", {"spec.dataset.columns": {}}, "spec.dataset.columns", "should have at least 1"),
    _refused("column without a name", {"spec.dataset.columns": {"prompt": ""}}, "spec.dataset.columns.prompt", "should have at least 1 character", "at least 1 chars long"),
    _refused("text column twice", {"spec.dataset.columns": {"text": "a"}, "spec.dataset.textField": "b"}, "spec.dataset.columns", "is given by dataset.textField already"),
    _refused("template of another format", {"spec.dataset.template": "{a}", "spec.dataset.format": "text"}, "spec.dataset.format", "must be template, or auto"),
    _refused("format without its template", {"spec.dataset.format": "template"}, "spec.dataset.format", "where dataset.template is set, and only there"),
    _refused("template without a column", {"spec.dataset.template": "text"}, "spec.dataset.template", "must hold the name of a column in braces"),
    _refused("template of half a column", {"spec.dataset.template": "{a} {b"}, "spec.dataset.template", "must hold whole column names in braces"),
    _refused("endless template", {"spec.dataset.template": "{a}" * 2000}, "spec.dataset.template", "should have at most 4096 characters", "Too long"),
    _refused("no model", {"spec.model": REMOVE}, "spec.model", "Required value"),
    _refused("no dataset", {"spec.dataset": REMOVE}, "spec.dataset", "Required value"),
    _refused("no output", {"spec.output": REMOVE}, "spec.output", "Required value"),
    _refused("model left empty", {"spec.model": None}, "spec.model", "Required value"),
    _refused("source left empty", {"spec.model.source": None}, "spec.model.source", "Required value"),
    _refused("spec left empty", {"spec": None}, "spec", "Required value"),
    _refused("misspelled section left empty", {"spec.lorra": None}, "spec.lorra", "unknown field"),
    _refused("module left empty", {"spec.lora.targetModules": [None]}, "spec.lora.targetModules", "must be of type string"),
    _refused("no source", {"spec.model": {}}, "spec.model.source", "Required value"),
    _refused("no spec", {"spec": REMOVE}, "spec", "Required value"),
    _refused("misspelled section", {"spec.lorra": {}}, "spec.lorra", "unknown field"),
    _refused("misspelled field", {"spec.lora.rnak": 8}, "spec.lora.rnak", "unknown field"),
    _refused("snake case", {"spec.training.batch_size": 8}, "spec.training.batch_size", "unknown field"),
    _refused("rank below 1", {"spec.lora.rank": -1}, "spec.lora.rank", "should be greater than or equal to 1"),
    _refused("rank as text", {"spec.lora.rank": "16"}, "spec.lora.rank", "must be of type integer"),
    _refused("rank with a fraction", {"spec.lora.rank": 16.5}, "spec.lora.rank", "must be of type integer"),
    _refused("huge rank", {"spec.lora.rank": 4096}, "spec.lora.rank", "should be less than or equal to 1024"),
    _refused("dropout of 1", {"spec.lora.dropout": 1}, "spec.lora.dropout", "should be less than 1"),
    _refused("negative dropout", {"spec.lora.dropout": -0.1}, "spec.lora.dropout", "should be greater than or equal to 0"),
    _refused("no target modules", {"spec.lora.targetModules": []}, "spec.lora.targetModules", "should have at least 1 item"),
    _refused("empty pattern", {"spec.lora.targetPattern": ""}, "spec.lora.targetPattern", "should have at least 1 character", "should be at least 1 chars long"),
    _refused("no layers", {"spec.lora.layersToTransform": []}, "spec.lora.layersToTransform", "should have at least 1 item"),
    _refused("a layer below 0", {"spec.lora.layersToTransform": [-1]}, "spec.lora.layersToTransform", "should be greater than or equal to 0"),
    _refused("GPU memory in words", {"spec.resources.gpuMemory": "lots"}, "spec.resources.gpuMemory", _QUANTITY),
    _refused("a pattern and layers", {"spec.lora.targetPattern": "q_proj", "spec.lora.layersToTransform": [1]}, "spec.lora.layersToTransform", "goes with targetModules only: the pattern itself can name layers"),
    _refused("no whole modules", {"spec.lora.modulesToSave": []}, "spec.lora.modulesToSave", "should have at least 1 item"),
    _refused("new tokens that are not trained", {"spec.dataset.addTokens": ["<a>"]}, "spec.dataset.addTokens", "needs lora.embeddings: true, or lora.modulesToSave with the model's embeddings"),
    _refused("no new tokens", {"spec.dataset.addTokens": [], "spec.lora.embeddings": True}, "spec.dataset.addTokens", "should have at least 1 item"),
    _refused("an empty token", {"spec.dataset.addTokens": [""], "spec.lora.embeddings": True}, "spec.dataset.addTokens", "should have at least 1 character", "should be at least 1 chars long"),
    _refused("unknown bias", {"spec.lora.bias": "some"}, "spec.lora.bias", 'supported values: "none", "all", "lora_only"'),
    _refused("adapter onto itself", {"spec.lora.initFrom": "s3://adapters/nli"}, "spec.output.uri", "must differ from lora.initFrom"),
    _refused("adapter onto itself, with a slash", {"spec.lora.initFrom": "s3://adapters/nli/"}, "spec.output.uri", "must differ from lora.initFrom"),
    _refused("adapter onto itself, without the slash", {"spec.lora.initFrom": "s3://adapters/nli", "spec.output.uri": "s3://adapters/nli/"}, "spec.output.uri", "must differ from lora.initFrom"),
    _refused("5 bits", {"spec.quantization.bits": 5}, "spec.quantization.bits", "upported value"),
    _refused("unknown 4-bit type", {"spec.quantization.type": "int4"}, "spec.quantization.type", 'supported values: "nf4", "fp4"'),
    _refused("8-bit DoRA", {"spec.quantization.bits": 8, "spec.lora.dora": True}, "spec.lora.dora", "needs quantization.bits 4 or 16"),
    _refused("batch of 0", {"spec.training.batchSize": 0}, "spec.training.batchSize", "should be greater than or equal to 1"),
    _refused("batch that micro-batches cannot fill", {"spec.training.microBatchSize": 5}, "spec.training.batchSize", _MULTIPLE),
    _refused("batch that GPUs cannot share", {"spec.resources.gpusPerNode": 3}, "spec.training.batchSize", _MULTIPLE),
    _refused("batch that nodes cannot share", {"spec.resources.nodes": 5}, "spec.training.batchSize", _MULTIPLE),
    _refused("checkpointing in words", {"spec.training.gradientCheckpointing": "some"}, "spec.training.gradientCheckpointing", "must be auto, enabled, disabled, selective or a number from 0"),
    _refused("checkpointing of less than no layers", {"spec.training.gradientCheckpointing": -1}, "spec.training.gradientCheckpointing", "or a number from 0 to 1024"),
    _refused("cached layers in words", {"spec.quantization.cachedLayers": "enabled"}, "spec.quantization.cachedLayers", "must be auto or a number from 0"),
    _refused("micro-batch of 0", {"spec.training.microBatchSize": 0}, "spec.training.microBatchSize", "must be auto or a number from 1"),
    _refused("micro-batch in words", {"spec.training.microBatchSize": "big"}, "spec.training.microBatchSize", "must be auto or a number from 1"),
    _refused("learning rate 0", {"spec.training.learningRate": 0}, "spec.training.learningRate", "should be greater than 0"),
    _refused("learning rate as text", {"spec.training.learningRate": "2e-4"}, "spec.training.learningRate", "must be of type number"),
    _refused("learning rate above 1", {"spec.training.learningRate": 2}, "spec.training.learningRate", "should be less than or equal to 1"),
    _refused("no epochs", {"spec.training.epochs": 0}, "spec.training.epochs", "should be greater than 0"),
    _refused("unknown scheduler", {"spec.training.scheduler": "cos"}, "spec.training.scheduler", '"cosine", "linear"'),
    _refused("unknown optimizer", {"spec.training.optimizer": "adam"}, "spec.training.optimizer", 'supported values: "paged_adamw_8bit"'),
    _refused("warm-up longer than the run", {"spec.training.warmupRatio": 1.5}, "spec.training.warmupRatio", "should be less than 1"),
    _refused("rows of no tokens", {"spec.training.maxLength": 0}, "spec.training.maxLength", "should be greater than or equal to 8"),
    _refused("packing as a boolean", {"spec.training.packing": True}, "spec.training.packing", "upported value", "must be of type string"),
    _refused("unknown precision", {"spec.training.precision": "int8"}, "spec.training.precision", '"bf16", "fp16", "fp32", "fp8"'),
    _refused("unknown scheme", {"spec.model.source": "http://host/model"}, "spec.model.source", "must be hf://owner/name, s3://bucket/key"),
    _refused("bare path", {"spec.dataset.train": "/data/train.jsonl"}, "spec.dataset.train", "must be hf://owner/name"),
    _refused("hub without an owner", {"spec.model.source": "hf://mistral"}, "spec.model.source", "must be hf://owner/name"),
    _refused("parent path", {"spec.dataset.train": "s3://data/../secret"}, "spec.dataset.train", "must not hold '.' or '..'"),
    _refused("parent path at the end", {"spec.output.uri": "file:///out/.."}, "spec.output.uri", "must not hold '.' or '..'"),
    _refused("parent path on a volume", {"spec.model.source": "pvc://models/../etc"}, "spec.model.source", "must not hold '.' or '..'"),
    _refused("credentials in the URI", {"spec.dataset.train": "s3://AKIA:pw@data/x"}, "spec.dataset.train", _CREDENTIALS),
    _refused("credentials with a slash", {"spec.dataset.train": "s3://AKIA:se/cret@data/x"}, "spec.dataset.train", _CREDENTIALS),
    _refused("credentials in a shouted URI", {"spec.dataset.train": "S3://AKIA:pw@data/x"}, "spec.dataset.train", _CREDENTIALS),
    _refused("credentials in a URI of two schemes", {"spec.output.uri": "s3+https://AKIA:pw@data/x"}, "spec.output.uri", _CREDENTIALS),
    _refused("credentials without a scheme", {"spec.output.uri": "AKIA:se/cret@data/x"}, "spec.output.uri", _CREDENTIALS),
    _refused("credentials after a space", {"spec.output.uri": " s3://AKIA:pw@data/x"}, "spec.output.uri", _CREDENTIALS),
    _refused("user in the URI", {"spec.lora.initFrom": "s3://AKIA@data/x"}, "spec.lora.initFrom", _CREDENTIALS),
    _refused("relative file", {"spec.model.source": "file://./model"}, "spec.model.source", "must not hold '.' or '..'"),
    _refused("space before a name", {"spec.output.uri": "s3://adapters/ job"}, "spec.output.uri", "a path may hold letters"),
    _refused("space after a URI", {"spec.output.uri": "s3://adapters/job "}, "spec.output.uri", "a path may hold letters"),
    _refused("space of no width", {"spec.output.uri": "s3://adapters/a\u200bb"}, "spec.output.uri", "a path may hold letters"),
    _refused("space that does not break", {"spec.output.uri": "s3://adapters/a\u00a0b"}, "spec.output.uri", "a path may hold letters"),
    _refused("name that is written backwards", {"spec.output.uri": "s3://adapters/a\u202eb"}, "spec.output.uri", "a path may hold letters"),
    _refused("bucket with a letter beyond ASCII", {"spec.dataset.train": "s3://données/x"}, "spec.dataset.train", "must be hf://owner/name"),
    _refused("control character in a URI", {"spec.output.uri": "s3://adapters/a\u0007b"}, "spec.output.uri", "a path may hold letters"),
    _refused("query in a URI", {"spec.dataset.train": "s3://data/x?versionId=1"}, "spec.dataset.train", "a path may hold letters"),
    _refused("shell in a path", {"spec.output.uri": "s3://adapters/$(id)"}, "spec.output.uri", "a path may hold letters"),
    _refused("newline in a URI", {"spec.output.uri": "s3://adapters/a\n"}, "spec.output.uri", "a path may hold letters"),
    _refused("an artifact that nobody makes", {"spec.output.artifacts": ["onnx"]}, "spec.output.artifacts", 'supported values: "merged"'),
    _refused("a repository without a place", {"spec.output.artifacts": ["hf"]}, "spec.output.artifacts", "hf needs output.hf.uri, the repository to push to"),
    _refused("a data set to push to", {"spec.output.hf": {"uri": "hf://datasets/me/nli"}}, "spec.output.hf.uri", "must be hf://owner/name, a model repository"),
    _refused("an image without a place", {"spec.output.artifacts": ["oci"]}, "spec.output.artifacts", "oci needs output.oci.uri, the image to push"),
    _refused("an image without a tag", {"spec.output.oci": {"uri": "oci://ghcr.io/team/nli"}}, "spec.output.oci.uri", "must be oci://registry/repository:tag"),
    _refused("an image with a password", {"spec.output.oci": {"uri": "oci://me:secret@ghcr.io/team/nli:v1"}}, "spec.output.oci.uri", "must not hold credentials"),
    _refused("an image in capital letters", {"spec.output.oci": {"uri": "oci://ghcr.io/Team/nli:v1"}}, "spec.output.oci.uri", "in lowercase but for the tag"),
    _refused("another field in braces in an image", {"spec.output.oci": {"uri": "oci://ghcr.io/team/{namespace}:v1"}}, "spec.output.oci.uri", "may hold {name}"),
    _refused("a quantization that is not made", {"spec.output.gguf": {"quantization": "q4_k_m"}}, "spec.output.gguf.quantization", 'supported values: "q8_0", "f16", "q4_0"'),
    _refused("an artifact twice", {"spec.output.artifacts": ["merged", "merged"]}, "spec.output.artifacts", "Duplicate value", server_says='Duplicate value: "merged"'),
    _refused("output on the hub", {"spec.output.uri": "hf://me/adapter"}, "spec.output.uri", "must be s3://bucket/key"),
    _refused("checkpoints on the hub", {"spec.checkpoint.uri": "hf://me/ckpt"}, "spec.checkpoint.uri", "must be s3://bucket/key"),
    _refused("upper-case bucket", {"spec.output.uri": "s3://Adapters/x"}, "spec.output.uri", "must be s3://bucket/key"),
    _refused("endless URI", {"spec.output.uri": "s3://adapters/" + "a" * 1024}, "spec.output.uri", "should have at most 1024", "Too long"),
    _refused("trusted code without a commit", {"spec.model.trustRemoteCode": True}, "spec.model.trustRemoteCode", "full commit hash"),
    _refused("trusted code at a branch", {"spec.model.trustRemoteCode": True, "spec.model.revision": "main"}, "spec.model.trustRemoteCode", "full commit hash"),
    _refused("early stopping without held-out rows", {"spec.evaluation.earlyStopping": {}}, "spec.evaluation.earlyStopping", "needs held-out rows: set dataset.eval"),
    _refused("a gate without held-out rows", {"spec.publish.onlyIf": [{"metric": "evalLoss", "atMost": 1}]}, "spec.publish.onlyIf", "needs held-out rows: set dataset.eval"),
    _refused("a gate of a metric that is not measured", {**_EVAL, "spec.publish.onlyIf": [{"metric": "f1", "atLeast": 0.9}]}, "spec.publish.onlyIf", "measured only when evaluation.metrics holds nli"),
    _refused("an empty gate", {**_EVAL, "spec.publish.onlyIf": []}, "spec.publish.onlyIf", "should have at least 1 item"),
    _refused("a gate that asks for nothing", {**_EVAL, "spec.publish.onlyIf": [{"metric": "evalLoss"}]}, "spec.publish.onlyIf", "needs one of atLeast, atMost and betterThan"),
    _refused("a gate that asks twice", {**_EVAL, "spec.publish.onlyIf": [{"metric": "evalLoss", "atMost": 1, "betterThan": "s3://a-b/c"}]}, "spec.publish.onlyIf", "needs one of atLeast, atMost and betterThan"),
    _refused("a loss that should rise", {**_EVAL, "spec.publish.onlyIf": [{"metric": "evalLoss", "atLeast": 0.5}]}, "spec.publish.onlyIf", "evalLoss takes atMost"),
    _refused("a score that should fall", {**_EVAL, "spec.evaluation.metrics": ["nli"], "spec.publish.onlyIf": [{"metric": "f1", "atMost": 0.5}]}, "spec.publish.onlyIf", "other metrics take atLeast"),
    _refused("a gate of an unknown metric", {**_EVAL, "spec.publish.onlyIf": [{"metric": "bleu", "atLeast": 0.5}]}, "spec.publish.onlyIf", "upported value"),
    _refused("an adapter that must beat what it replaces", {**_EVAL, "spec.publish.onlyIf": [{"metric": "evalLoss", "betterThan": "s3://adapters/nli/"}]}, "spec.output.uri", "must not be or hold the adapter of publish.onlyIf"),
    _refused("an adapter that must beat one below it", {**_EVAL, "spec.publish.onlyIf": [{"metric": "evalLoss", "betterThan": "s3://adapters/nli/old"}]}, "spec.output.uri", "must not be or hold the adapter of publish.onlyIf"),
    _refused("an adapter to beat on the hub", {**_EVAL, "spec.publish.onlyIf": [{"metric": "evalLoss", "betterThan": "hf://a/b"}]}, "spec.publish.onlyIf", "must be s3://bucket/key"),
    _refused("nli metrics without held-out rows", {"spec.evaluation.metrics": ["nli"]}, "spec.evaluation.metrics", "needs held-out rows: set dataset.eval"),
    _refused("accuracy that is not measured", {**_EVAL, "spec.evaluation.earlyStopping": {"metric": "accuracy"}}, "spec.evaluation.earlyStopping", "only when evaluation.metrics holds nli"),
    _refused("unknown metric", {**_EVAL, "spec.evaluation.metrics": ["bleu"]}, "spec.evaluation.metrics", 'supported values: "loss", "nli"'),
    _refused("no nodes", {"spec.resources.nodes": 0}, "spec.resources.nodes", "should be greater than or equal to 1"),
    _refused("negative GPUs", {"spec.resources.gpusPerNode": -1}, "spec.resources.gpusPerNode", "should be greater than or equal to 0"),
    _refused("memory in words", {"spec.resources.memory": "lots"}, "spec.resources.memory", _QUANTITY),
    _refused("memory in GB", {"spec.resources.memory": "16GB"}, "spec.resources.memory", _QUANTITY),
    _refused("negative memory", {"spec.resources.memory": -1}, "spec.resources.memory", _QUANTITY),
    _refused("memory of nothing", {"spec.resources.memory": ""}, "spec.resources.memory", _QUANTITY),
    _refused("endless memory", {"spec.resources.memory": "1" * 33}, "spec.resources.memory", _QUANTITY, "Too long"),
    _refused("fraction without quotes", {"spec.resources.cpu": 1.5}, "spec.resources.cpu", _QUANTITY, "must be of type integer,string"),
    _refused("quantity as a boolean", {"spec.resources.cpu": True}, "spec.resources.cpu", _QUANTITY, "must be of type integer,string"),
    *(
        _refused(f"revision {revision}", {"spec.model.revision": revision}, "spec.model.revision", "must not hold '..'")
        for revision in ("a/../../b", "a..b", "a/..", "a/.", "a/./b", "a//b", "a/", "a/.git", "v1.")
    ),
    _refused("revision with a space", {"spec.model.revision": "my branch"}, "spec.model.revision", "must be a branch, tag or commit"),
    _refused("unqualified GPU resource", {"spec.resources.gpuResource": "gpu"}, "spec.resources.gpuResource", "must be an extended resource with its domain, such as nvidia.com/gpu"),
    _refused("GPU resource with a long name", {"spec.resources.gpuResource": f"example.com/{'g' * 64}"}, "spec.resources.gpuResource", "at most 63 characters after the slash"),
    _refused("GPU resource with an odd domain", {"spec.resources.gpuResource": "-a.com/gpu"}, "spec.resources.gpuResource", "must be an extended resource with its domain"),
    _refused("label with a long name", {"spec.resources.nodeSelector": {f"example.com/{'z' * 64}": "a"}}, "spec.resources.nodeSelector", "at most 63 characters after the slash"),
    _refused("secret name with a slash", {"spec.output.secretRef": {"name": "a/b"}}, "spec.output.secretRef.name", _OBJECT_NAME),
    _refused("secret name of nothing", {"spec.output.secretRef": {"name": ""}}, "spec.output.secretRef.name", _OBJECT_NAME),
    _refused("claim in capitals", {"spec.cache": {"claimName": "Cache"}}, "spec.cache.claimName", _OBJECT_NAME),
    _refused("secret without a name", {"spec.output.secretRef": {}}, "spec.output.secretRef.name", "Required value"),
    _refused("deadline of 0", {"spec.activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds", "should be greater than or equal to 1"),
    _refused("no attempts", {"spec.recovery.maxAttempts": 0}, "spec.recovery.maxAttempts", "should be greater than or equal to 1"),
    _refused("suspend in words", {"spec.suspend": "yes"}, "spec.suspend", "must be of type boolean"),
    _refused("image with a space", {"spec.image": "trainer latest"}, "spec.image", "must be an image such as registry.example.com/team/trainer:1.2"),
    _refused("name too long", {"metadata.name": "a" * 51}, "metadata.name", _NAME),
    _refused("name with a dot", {"metadata.name": "nli.v1"}, "metadata.name", _NAME),
    _refused("name starting with a digit", {"metadata.name": "7b"}, "metadata.name", _NAME),
    _refused("misspelled affinity", {"spec.resources.affinity": {"nodeAffinty": {}}}, "spec.resources.affinity.nodeAffinty", "unknown field"),
    _refused("affinity nested without end", {"spec.resources.affinity": nested(30)}, "spec.resources.affinity.a", "unknown field"),
    _refused("affinity that is a list", {"spec.resources.affinity": []}, "spec.resources.affinity", "must be of type object"),
    _refused("unknown operator", {_NODES: [{"matchExpressions": [{"key": "a", "operator": "Equals", "values": ["b"]}]}]}, _NODES, "supported values"),
    _refused("operator without values", {_NODES: [{"matchExpressions": [{"key": "a", "operator": "In"}]}]}, _NODES, "must be given for In"),
    _refused("values that are not looked at", {_NODES: [{"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}]}, _NODES, "left out for Exists"),
    _refused("no term", {_NODES: []}, _NODES, "at least 1 item"),
    _refused("too many terms", {_NODES: [{}] * 17}, _NODES, "at most 16 items", "must have at most 16 items"),
    _refused("too many values in all", {_NODES: [{"matchExpressions": _expressions(31)}, {"matchExpressions": _expressions(32)}]}, "spec.resources.affinity.nodeAffinity", "must hold at most 64 expressions, values, labels, keys and namespaces in all"),
    _refused("too many labels of pods in all", {f"spec.resources.affinity.podAffinity.{_REQUIRED}": [{"topologyKey": "a", "labelSelector": {"matchLabels": {f"l{i}": "" for i in range(22)}}}] * 3}, "spec.resources.affinity.podAffinity", "must hold at most 64 expressions"),
    _refused("too long a key of a node label", {"spec.resources.nodeSelector": {"k" * 318: "v"}}, "spec.resources.nodeSelector", "keys must have at most 317 characters"),
]  # fmt: skip

CASES = [*ACCEPTED, *REFUSED]
