"""What an adapter was made of: rows, code, and the adapter that training began with."""

import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api import constants
from finetune_api.artifact_manifest import Lineage, Parent
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.checkpoints.fingerprint import digest_of
from finetune_trainer.data.dataset import Datasets
from finetune_trainer.stores import manifest

if TYPE_CHECKING:
    from finetune_trainer.evaluation.evaluator import EvalPrompt


def lineage_of(
    spec: FineTuneJobSpec, data: Datasets, init_from: Path | None, prompts: Sequence["EvalPrompt"] = ()
) -> Lineage:
    """Return the lineage of what is trained.

    Args:
        spec: The job's spec.
        data: The rows that were trained and evaluated on.
        init_from: The files of the adapter of lora.initFrom, as they were read.
        prompts: The held-out rows that answers are generated for.
    """
    return Lineage(
        code_version=metadata.version("finetune-operator"),
        train_rows=f"sha256:{digest_of(data.train)}",
        eval_rows=f"sha256:{digest_of(data.eval)}" if data.eval else None,
        eval_prompts=_digest_of_prompts(spec, prompts) if prompts else None,
        parent=_parent(spec.lora.init_from, init_from),
    )


def _parent(uri: str | None, folder: Path | None) -> Parent | None:
    if uri is None or folder is None:
        return None
    file = folder / constants.MANIFEST_FILE
    return Parent(uri=uri, manifest_digest=manifest.digest_of(file.read_bytes()) if file.is_file() else None)


def _digest_of_prompts(spec: FineTuneJobSpec, prompts: Sequence["EvalPrompt"]) -> str:
    """Return the digest of all that decides the metrics of generated answers, but the model."""
    settings = spec.evaluation.generation
    sha = hashlib.sha256(json.dumps([settings.label_key, settings.max_new_tokens]).encode())
    for each in prompts:
        sha.update(json.dumps([each.prompt, each.label]).encode())
    return f"sha256:{sha.hexdigest()}"
