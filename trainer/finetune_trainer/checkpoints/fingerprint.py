"""The fingerprint of a run: what decides its result."""

import hashlib
import json
from array import array
from typing import Any

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.data.dataset import TokenizedDataset


def fingerprint(spec: FineTuneJobSpec, base_commit: str | None, *rows: TokenizedDataset) -> str:
    """A digest of what decides the result: a checkpoint is resumed only by a run of the same fingerprint.

    That is the spec, the base model's commit on the hub, and what the data files held (`rows`: training and held-out
    rows as token ids), for a URI stays when what lies there is replaced. Weights replaced under one file:// or s3://
    URI are not noticed. The micro-batch is left out, for it may shrink between attempts; so is all that only says how
    to run or report.
    """
    manifest = spec.manifest()
    parts: dict[str, Any] = {key: manifest[key] for key in ("model", "dataset", "quantization", "lora", "training")}
    parts["training"] = {key: value for key, value in manifest["training"].items() if key not in _HOW}
    parts["model"].pop("secretRef", None)
    parts["model"].pop("attention", None)
    parts["dataset"].pop("secretRef", None)
    parts["evaluation"] = manifest["evaluation"]  # decides when to stop, and which adapter is the best
    parts["commit"] = base_commit
    parts["rows"] = [_digest(each) for each in rows]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_HOW = ("microBatchSize", "packing", "gradientCheckpointing")


def _digest(rows: TokenizedDataset) -> str:
    sha = hashlib.sha256()
    for ids, labels in zip(rows.input_ids, rows.labels, strict=True):
        sha.update(array("i", (len(ids), *ids, *labels)).tobytes())
    return sha.hexdigest()
