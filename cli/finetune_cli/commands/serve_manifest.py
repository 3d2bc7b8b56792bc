"""`finetune serve-manifest`: complete YAML that serves an adapter in a cluster."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_api import constants
from finetune_api.plain_text import one_line
from finetune_cli.errors import CliError, Exit
from finetune_cli.options import AdapterSource, Context, Kubeconfig, Namespace
from finetune_cli.output import console
from finetune_cli.serving import Platform, Served, Setup, manifest, max_rank

if TYPE_CHECKING:
    from finetune_cli.published import Published

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?")
_COMMIT = re.compile("[0-9a-f]{40}")
#: A config of an adapter is small; more is none.
_CONFIG_BYTES = 1 << 20


def serve_manifest(
    source: AdapterSource,
    platform: Annotated[Platform, typer.Option("--for", help="What serves it.")] = Platform.VLLM,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What requests call the adapter. Default: its job's name.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Base model, if the adapter names none.", show_default=False),
    ] = None,
    secret: Annotated[
        str | None,
        typer.Option("--secret", metavar="NAME", help="Secret with the store's credentials.", show_default=False),
    ] = None,
    model_secret: Annotated[
        str | None,
        typer.Option(
            "--model-secret", metavar="NAME", help="Secret with HF_TOKEN for a gated base model.", show_default=False
        ),
    ] = None,
    canary: Annotated[
        str | None,
        typer.Option("--canary", metavar="NAME|URI", help="Adapter that gets a share (llm-d).", show_default=False),
    ] = None,
    percent: Annotated[int, typer.Option("--canary-percent", min=1, max=99, help="That share.")] = 10,
    gpus: Annotated[int, typer.Option("--gpus", min=1, max=64, help="GPUs of one replica.")] = 1,
    replicas: Annotated[int, typer.Option("--replicas", min=1, max=1000, help="Replicas.")] = 1,
    image: Annotated[str, typer.Option("--image", help="vLLM's image.")] = "vllm/vllm-openai:v0.24.0",
    trainer_image: Annotated[
        str, typer.Option("--trainer-image", help="Trainer image, which fetches the adapter.")
    ] = "finetune-trainer:latest",
    gateway: Annotated[str, typer.Option("--gateway", help="Name of the Gateway (llm-d).")] = "inference-gateway",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print Kubernetes objects that serve an adapter with vLLM.

    An init container fetches the adapter and compares every file with the manifest that is published now, whose digest
    is written into the YAML: another adapter at the same URI is never served. The base model is the commit that the
    adapter was trained on. The controllers of KServe, AIBrix, the vLLM production stack or llm-d must be installed.

    Examples:
        finetune serve-manifest nli --secret s3-read | kubectl apply -f -
        finetune serve-manifest s3://adapters/nli --for kserve --secret s3-read
        finetune serve-manifest s3://adapters/nli --for llm-d --canary s3://adapters/nli/run-8 --canary-percent 5

    Exit codes:
        0    the YAML is printed
        1    the input is wrong, or vLLM cannot serve this adapter
        3    the store is out of reach, or access is denied
        5    the adapter is not what its manifest says
    """
    import yaml

    from finetune_api.patterns import JOB_NAME
    from finetune_cli.published import locate

    if canary and platform is not Platform.LLM_D:
        raise CliError("--canary needs --for llm-d: only a model rewrite splits one name between two adapters")
    if model_secret and platform is Platform.KSERVE:
        raise CliError("--model-secret: KServe fetches the base model itself: give its ServiceAccount the token")
    found = locate(source, namespace, context, kubeconfig, "finetune serve-manifest {}", adapters_only=True)
    name = name or (found.manifest.job.name if found.manifest.job else "") or found.address.rstrip("/").split("/")[-1]
    if not JOB_NAME.holds(name):
        raise CliError(f"--name: {name!r:.80} {JOB_NAME.message}")
    other = (
        locate(canary, namespace, context, kubeconfig, "finetune serve-manifest --canary {}", adapters_only=True)
        if canary
        else None
    )
    if other and other.digest == found.digest:
        raise CliError(f"--canary: {other.address} is the same adapter")
    if other and (other.manifest.base_model, other.manifest.base_commit) != (
        found.manifest.base_model,
        found.manifest.base_commit,
    ):
        raise CliError(f"--canary: {other.address} was trained on another base model than {found.address}")
    model, commit = _base(found, base), found.manifest.base_commit
    setup = Setup(name, model, commit, image, trainer_image, secret, gpus, replicas, gateway, model_secret=model_secret)
    objects = manifest(platform, setup, _served(found, name), _served(other, name) if other else None, percent)
    console.out().print(yaml.safe_dump_all(objects, sort_keys=False), end="", soft_wrap=True, markup=False)


def _base(found: Published, given: str | None) -> str:
    model, commit = given or found.manifest.base_model or "", found.manifest.base_commit
    if not _HUB_ID.fullmatch(model):
        named = one_line(model)[:120] or "a model that its manifest does not name"
        raise CliError(
            f"{found.address} was trained on {named}, which vLLM cannot load by that name",
            hint="add --base owner/name",
        )
    if commit is not None and not _COMMIT.fullmatch(commit):
        raise CliError(f"{found.address}: {one_line(commit)[:80]} is no commit of {model}", code=Exit.CORRUPT)
    return model


def _served(found: Published, name: str) -> Served:
    """Return the adapter as it is served. Raises CliError for what vLLM cannot serve."""
    if not found.address.startswith("s3://"):
        raise CliError(f"{found.address} cannot be read from a cluster", hint="publish it to s3://")
    config = _config(found)
    for field, wrong in (("use_dora", True), ("modules_to_save", None)):
        value = config.get(field)
        if (value is True) if wrong else bool(value):
            raise CliError(f"{found.address}: vLLM does not serve adapters with {field}", hint="serve a merged model")
    if config.get("bias", "none") != "none":
        raise CliError(f"{found.address}: vLLM does not serve adapters with bias", hint="serve a merged model")
    rank = found.manifest.rank or 0
    if not rank or max_rank([rank]) is None:
        raise CliError(f"{found.address}: vLLM does not serve adapters of rank {rank}", hint="serve a merged model")
    return Served(name, found.address, found.digest, rank)


def _config(found: Published) -> dict[str, Any]:
    import hashlib
    import json

    from finetune_cli import storage

    listed = {file.path: file.sha256 for file in found.manifest.files}
    with storage.store_errors():
        data = found.store.read_bytes(constants.ADAPTER_CONFIG_FILE, _CONFIG_BYTES)
    where = found.store.uri_of(constants.ADAPTER_CONFIG_FILE)
    if hashlib.sha256(data).hexdigest() != listed.get(constants.ADAPTER_CONFIG_FILE):
        raise CliError(f"{where} is not what its manifest says", code=Exit.CORRUPT)
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CliError(f"{where} is no JSON object", code=Exit.CORRUPT)
    return config
