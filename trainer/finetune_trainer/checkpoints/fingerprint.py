"""The fingerprint of a run: what decides its result."""

import hashlib
import json
from array import array
from collections.abc import Iterable
from typing import Any, Final

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.data.dataset import TokenizedDataset

#: Fields of the spec that do not change the result: where things lie, how to run, what to report. All others count, so
#: that a field added later does.
EXECUTION_ONLY_FIELDS: Final = frozenset(
    {
        "model.secretRef",
        "model.attention",
        "dataset.secretRef",
        "dataset.loss",  # the labels count
        "training.microBatchSize",  # may shrink between attempts
        "training.packing",
        "training.gradientCheckpointing",
        "evaluation.generation.publishAnswers",
        "training.cudaGraphs",
        "checkpoint",
        "logging",
        "resources",
        "cache",
        "output",
        "recovery",
        "image",
        "suspend",
        "activeDeadlineSeconds",
        "pendingDeadlineSeconds",
        "ttlSecondsAfterFinished",
    }
)
#: Fields that came later, and the value that does what was done before: with it a spec is what it was without.
LATER_FIELDS: Final = {"lora.embeddings": False}


def fingerprint(spec: FineTuneJobSpec, base_commit: str | None, rows: Iterable[TokenizedDataset]) -> str:
    """Return a digest of what decides the result: only a run with the same fingerprint resumes a checkpoint.

    Weights replaced under one file:// or s3:// URI go unnoticed.

    Args:
        spec: All of it counts but EXECUTION_ONLY_FIELDS, and LATER_FIELDS at their defaults.
        base_commit: The hub's commit of the base model.
        rows: Training and held-out rows: a URI stays the same when the files under it are replaced.
    """
    parts = _without(spec.manifest(), EXECUTION_ONLY_FIELDS)
    parts["commit"] = base_commit
    parts["rows"] = [digest_of(each) for each in rows]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _without(manifest: dict[str, Any], paths: frozenset[str], parent: str = "") -> dict[str, Any]:
    """Return a copy of `manifest` without the dotted `paths`."""
    return {
        key: _without(value, paths, f"{parent}{key}.") if isinstance(value, dict) else value
        for key, value in manifest.items()
        if parent + key not in paths and LATER_FIELDS.get(parent + key, ...) != value
    }


def digest_of(rows: TokenizedDataset) -> str:
    """Return the SHA-256 of rows as token ids and labels, in hexadecimal digits."""
    sha = hashlib.sha256()
    for ids, labels in zip(rows.input_ids.arrays(), rows.labels.arrays(), strict=True):
        for part in (array("i", (len(ids),)), ids, labels):
            sha.update(part)
    return sha.hexdigest()
