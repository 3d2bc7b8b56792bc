"""Sections of the spec: what a job reads and where its adapter goes."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from finetune_api.artifact_names import ArtifactName
from finetune_api.base import ApiModel, Rule
from finetune_api.fields import (
    Columns,
    ImageUri,
    Name,
    ReadableUri,
    RepositoryUri,
    Revision,
    RowTemplate,
    Text,
    WritableUri,
    refusal,
)


class SecretRef(ApiModel):
    """A Secret of the job's namespace. The operator never reads it: pods mount it."""

    name: Name
    """Name of the Secret."""


class Model(ApiModel):
    """The base model."""

    RULES: ClassVar = (
        Rule(
            "!self.trustRemoteCode || (has(self.revision) && self.revision.matches('^[0-9a-f]{40}$'))",
            lambda m: not m.trust_remote_code or re.fullmatch("[0-9a-f]{40}", m.revision or "") is not None,
            "needs model.revision to be a full commit hash (40 hexadecimal digits), so that the code cannot change",
            "trustRemoteCode",
        ),
    )

    source: ReadableUri
    """Where the model lies: hf://owner/name, or a folder at s3://, pvc:// or file:// (safetensors only)."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub model. Pin a commit to make the run repeatable."""
    secret_ref: SecretRef | None = None
    """Secret with HF_TOKEN for gated models, or AWS_* keys for s3://."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings. Needs the administrator's permission and a pinned commit."""
    attention: Literal["auto", "flash_attention_2", "varlen", "sdpa", "eager"] = "auto"
    """Attention implementation. auto takes the fastest that is installed and says which."""


class Source(ApiModel):
    """One of several sources of training rows."""

    uri: ReadableUri
    """Where its rows lie, as in dataset.train."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1
    """How often an epoch holds each row. 0.3: three rows of ten, always the same; 2.5: every row twice, half thrice."""


class Dataset(ApiModel):
    """Training and evaluation rows: JSON Lines, JSON, CSV (also as .gz, .xz, .zst) or Parquet; a file, or a prefix."""

    RULES: ClassVar = (
        Rule(
            "has(self.train) != has(self.sources)",
            lambda d: (d.train is None) != (d.sources is None),
            "must be given, or dataset.sources in its place",
            "train",
        ),
        Rule(
            "!has(self.eval) || !has(self.evalFraction)",
            lambda d: d.eval is None or d.eval_fraction is None,
            "must not be given beside dataset.eval",
            "evalFraction",
        ),
        Rule(
            "self.textField == 'text' || !has(self.columns) || !('text' in self.columns)",
            lambda d: d.text_field == "text" or "text" not in (d.columns or {}),
            "is given by dataset.textField already",
            "columns",
        ),
        Rule(
            "has(self.template) ? self.format in ['auto', 'template'] : self.format != 'template'",
            lambda d: d.format in ("auto", "template") if d.template is not None else d.format != "template",
            "must be template, or auto, where dataset.template is set, and only there",
            "format",
        ),
    )

    train: ReadableUri | None = None
    """Training rows. Needed, or sources."""
    sources: Annotated[list[Source], Field(min_length=1, max_length=16)] | None = None
    """Several sources of training rows, each with a weight, in place of train."""
    eval: ReadableUri | None = None
    """Held-out rows for the evaluation loss, early stopping and keepBest."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Part of the training rows to hold out instead of dataset.eval, chosen by training.seed and what a row says: equal
    rows stay together, and every attempt holds out the same."""
    format: Literal["auto", "text", "prompt-completion", "messages", "sharegpt", "alpaca", "template"] = "auto"
    """Shape of a row. auto looks at the columns of the first: messages (with OpenAI's tools and weights too),
    conversations (sharegpt), prompt and completion, instruction and output (alpaca), or text."""
    text_field: Text = "text"
    """Column that holds the whole text, when the format is text."""
    columns: Columns | None = None
    """What the data calls the columns of its format, such as {prompt: question, completion: answer}."""
    template: RowTemplate | None = None
    """Text of a row, with the names of columns in braces: "Q: {question}". A column completion (or output) is learned
    and the rest is its prompt; without one the whole text is learned. {{ and }} stand for braces."""
    loss: Literal["assistant", "all"] = "assistant"
    """What is learned: the assistant's turns (of a prompt and completion, the completion), or every token. Of plain
    texts, every token is."""
    add_tokens: Annotated[list[Text], Field(min_length=1, max_length=1024)] | None = None
    """Words that become one token each, such as <tool_call>. Their embeddings begin as the mean of the others, and must
    be trained: lora.embeddings, or lora.modulesToSave with the embeddings."""
    secret_ref: SecretRef | None = None
    """Secret with AWS_* keys or HF_TOKEN for the data."""

    @property
    def holds_out(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.eval is not None or self.eval_fraction is not None

    @property
    def uris(self) -> dict[str, str]:
        """All that is read, by its field below dataset."""
        found = {f"sources[{index}].uri": source.uri for index, source in enumerate(self.sources or ())}
        return {name: uri for name, uri in (("train", self.train), *found.items(), ("eval", self.eval)) if uri}


class Cache(ApiModel):
    """A volume shared by jobs for models, data sets and compiled kernels."""

    claim_name: Name
    """PersistentVolumeClaim of the job's namespace."""


def _each_once(values: list[str]) -> list[str]:
    if len(set(values)) < len(values):
        raise refusal("Duplicate value: each artifact is named once")
    return values


class Gguf(ApiModel):
    """The GGUF file of output.artifacts."""

    quantization: Literal["q8_0", "f16", "q4_0"] = "q8_0"
    """How its weights are stored: in 8, 16 or 4 bits. With q4_0 the embeddings keep 8 bits."""


class Oci(ApiModel):
    """The adapter as an image in an OCI registry."""

    uri: ImageUri
    """Repository and tag, as in oci://registry.example.com/team/nli:v1. The adapter's files lie at the image's root,
    each in a layer of its own: Kubernetes can mount it as an image volume. {name} stands for the job's name."""
    secret_ref: SecretRef | None = None
    """Secret of type kubernetes.io/dockerconfigjson with the registry's user and password."""


class Hf(ApiModel):
    """The adapter in a model repository of the hub."""

    uri: RepositoryUri
    """The repository, as in hf://my-org/nli. One that is not there is made, a private one. {name} stands for the job's
    name."""
    secret_ref: SecretRef | None = None
    """Secret with an HF_TOKEN that may write there, and HF_ENDPOINT for another hub than huggingface.co."""


class Output(ApiModel):
    """Where the adapter goes."""

    RULES: ClassVar = (
        Rule(
            "!('oci' in self.artifacts) || has(self.oci)",
            lambda o: "oci" not in o.artifacts or o.oci is not None,
            "oci needs output.oci.uri, the image to push",
            "artifacts",
        ),
        Rule(
            "!('hf' in self.artifacts) || has(self.hf)",
            lambda o: "hf" not in o.artifacts or o.hf is not None,
            "hf needs output.hf.uri, the repository to push to",
            "artifacts",
        ),
    )

    uri: WritableUri
    """Prefix that will hold the adapter. Its manifest.json is written last: where it is, the adapter is whole. {name}
    stands for the job's name, as in s3://adapters/{name}. While another job of the namespace that is not over writes
    there, this one waits."""
    secret_ref: SecretRef | None = None
    """Secret with AWS_* keys for the output and the checkpoints."""
    overwrite: bool = False
    """Replace an adapter that is already there. Otherwise the job refuses to start."""
    keep_checkpoints: bool = False
    """Leave the checkpoints in place after success."""
    artifacts: Annotated[
        list[ArtifactName],
        Field(max_length=4, json_schema_extra={"x-kubernetes-list-type": "set"}),
        AfterValidator(_each_once),
    ] = []
    """What to make of the adapter besides, each in a folder of its name below uri. merged: the whole model in 16 bits,
    with the adapter in its weights. gguf: the same in one GGUF file for llama.cpp, with a Modelfile for Ollama. And
    where to put the adapter itself besides: oci, as an image in a registry; hf, in a model repository of the hub. One
    that fails leaves the adapter published, and says why in status.artifacts."""
    gguf: Gguf = Field(default_factory=Gguf)
    """How the GGUF file is made."""
    oci: Oci | None = None
    """The image of artifact oci."""
    hf: Hf | None = None
    """The repository of artifact hf."""
