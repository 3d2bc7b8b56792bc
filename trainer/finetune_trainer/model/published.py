"""A published adapter on its base model, loaded by the job that was published with it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune_api import constants
from finetune_api.manifest import ManifestError, load_file
from finetune_api.spec import FineTuneJob
from finetune_api.status import ExecutionPlan
from finetune_api.uri import parse
from finetune_trainer.data.tokenizer import check_vocabulary, load_tokenizer
from finetune_trainer.data.tokenizer_files import drop_file_names
from finetune_trainer.errors import ConfigInvalid, first_line, weights_must_fit
from finetune_trainer.inputs import base_model_id, fetch_model_metadata, fetch_model_weights
from finetune_trainer.model.adapter import attach_adapter, check_init_from
from finetune_trainer.model.base import BaseModel, inspect_base_model
from finetune_trainer.model.checkpoint import check_weights
from finetune_trainer.model.weights import load_base_model
from finetune_trainer.settings import Settings
from finetune_trainer.stores.mirror import mirror
from finetune_trainer.stores.tree import Tree

JOB_FILE = f"{constants.TRAINING_DIR}/job.yaml"


@dataclass(frozen=True)
class PublishedAdapter:
    """An adapter on its base model.

    Attributes:
        base: The base model, with the tokenizer that was published with the adapter.
        model: The PEFT model, in evaluation mode.
        weights: The base model's folder, weights included.
    """

    base: BaseModel
    model: Any
    weights: Path


def gpu_here() -> bool:
    """Return whether there is a GPU that torch can use."""
    return torch.cuda.is_available()


def job_of(folder: Path, overrides: Sequence[str] = ()) -> FineTuneJob:
    """Return the job that trained the adapter in `folder`, a copy that was compared with its manifest.

    Code of the base model's repository does not run on the word of whoever can write to the bucket: `overrides` must
    say so.

    Raises:
        ConfigInvalid: The job is missing, or cannot be read.
    """
    try:
        return load_file(folder / JOB_FILE, ["model.trustRemoteCode=false", *overrides])
    except ManifestError as error:
        raise ConfigInvalid(f"the adapter's {JOB_FILE} cannot be used: {first_line(error)}") from None


def load_published(folder: Path, settings: Settings, work: Path, device: str) -> PublishedAdapter:
    """Load the adapter in `folder` on its base model, of the commit that it was trained on, as it was trained.

    Args:
        folder: The adapter's files, compared with its manifest.
        settings: Its job, and where models are kept.
        work: A folder of this process.
        device: torch's name of the device.

    Raises:
        TrainerError: The base model is missing or denied, does not fit the device, or the adapter does not fit it.
    """
    spec = settings.spec
    files = fetch_model_metadata(settings, work, trained_commit(folder, settings))
    base = inspect_base_model(files, spec)
    base = replace(base, tokenizer=_tokenizer(folder, work / "adapter", settings))
    embeddings = base.config.get_text_config(decoder=True).vocab_size
    check_vocabulary(base.tokenizer, max(embeddings, base.new_tokens.size))
    check_init_from(folder, spec)
    weights = fetch_model_weights(settings, work, base.commit)
    check_weights(weights, base, spec)
    with weights_must_fit(spec.model.source, spec.quantization.bits):
        model = load_base_model(weights, base, spec, ExecutionPlan(attention=base.attention), device)
        model = attach_adapter(model, base, spec.lora, folder)
    return PublishedAdapter(base, model.eval(), weights)


def trained_commit(folder: Path, settings: Settings) -> str | None:
    """Return the commit of the base model on the hub that the adapter in `folder` was trained on, if it is known.

    Of another repository than the adapter names, which --base may, nothing is known.
    """
    source = settings.spec.model.source
    if parse(source).scheme != "hf":
        return None
    try:
        found = json.loads((folder / constants.ADAPTER_CONFIG_FILE).read_bytes())
        revision = found.get("revision") if found.get("base_model_name_or_path") == base_model_id(source) else None
    except (OSError, ValueError, RecursionError, AttributeError):
        return None  # said by check_init_from
    return revision if isinstance(revision, str) and revision else None


def _tokenizer(folder: Path, copy: Path, settings: Settings) -> Any:
    """Return the tokenizer in `folder`, read from a copy that names no files of this machine."""
    uri = parse(f"file://{folder.absolute()}")
    mirror(Tree.of(uri, "adapter"), folder, copy)
    drop_file_names(copy)
    return load_tokenizer(copy, str(uri), settings.spec.model.trust_remote_code)
