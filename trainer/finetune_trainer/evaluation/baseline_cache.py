"""What was measured of a base model, kept for the next job that would measure the same.

Jobs with the same base weights, held-out rows and settings have the same metrics before training. A file of the shared
cache says all that they depend on, and serves only where all of it is the same: the weights by a digest of the numbers
in memory, which are those that would be measured.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import structlog
import torch

import finetune_trainer
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.checkpoints.fingerprint import digest_of
from finetune_trainer.data.dataset import TokenizedDataset
from finetune_trainer.stores import fsync

log = structlog.get_logger(__name__)
#: Bytes of the largest file that is read: others may write to the cache.
_LARGEST: Final = 1 << 16
#: Words of 64 bits that are digested at one time: 128 MiB, and their places and products three times as much.
_CHUNK: Final = 1 << 24
#: An odd number: a word that changes always changes the sum of the words' products with odd numbers, modulo 2^64.
_STEP: Final = 0x9E3779B97F4A7C15 - 2**64
_LIBRARIES: Final = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers")
#: What of a plan is no way to compute.
_TOLD_ONLY: Final = {"predictedPeakMemoryBytes", "measuredPeakMemoryBytes"}
#: What of a configuration says where it is from.
_FROM: Final = ("_name_or_path", "_commit_hash", "transformers_version")
#: What an evaluation measures, besides counts: others may write to the cache, but not what they like into a status.
_NAMES: Final = {"evalLoss", "accuracy", "precision", "recall", "f1", "validJson"}
_COUNTS: Final = "confusion."


class BaselineCache:
    """One file for each set of things that the metrics depend on.

    Attributes:
        file: Where the metrics are kept.
    """

    def __init__(self, folder: Path, depends_on: Mapping[str, Any]) -> None:
        """Look below `folder` for what was measured of exactly `depends_on` (JSON)."""
        self._depends_on = json.loads(json.dumps(depends_on, sort_keys=True))
        self.file = folder / f"{_sha256(self._depends_on)}.json"

    def find(self) -> dict[str, float] | None:
        """Return the metrics; None if there are none, or they are not whole, or of something else."""
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as opened:
                kept = json.loads(opened.read(_LARGEST))
            metrics = kept["metrics"]
            whole = kept["sha256"] == _sha256(metrics) and kept["dependsOn"] == self._depends_on
            if whole and "evalLoss" in metrics and all(map(_is_metric, metrics.items())):
                return dict(metrics)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        log.warning(f"The base model is measured anew: {self.file} does not hold what its name says")
        return None

    def keep(self, metrics: Mapping[str, float]) -> None:
        """Write `metrics`, whole or not at all. A cache that cannot be written costs time, no more."""
        values = {name: float(value) for name, value in metrics.items()}
        kept = {"dependsOn": self._depends_on, "metrics": values, "sha256": _sha256(values)}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.file.parent)
            try:
                with os.fdopen(descriptor, "w") as written:
                    os.fchmod(descriptor, 0o644)  # pods of other users share the cache
                    json.dump(kept, written)
                fsync.replace(Path(name), self.file)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            log.warning(f"The base model's metrics are not kept for other jobs: {error}")


def can_be_kept(spec: FineTuneJobSpec, plan: ExecutionPlan, new_tokens: int) -> bool:
    """Return whether `baseline_depends_on` says all: not of the model's own code, nor of an adapter to go on with."""
    return not (plan.sharded or spec.model.trust_remote_code or spec.lora.init_from or new_tokens)


def baseline_depends_on(
    model: Any,
    spec: FineTuneJobSpec,
    plan: ExecutionPlan,
    tokenizer: Any,
    rows: TokenizedDataset,
    prompts: Sequence[Any],
) -> dict[str, Any]:
    """Return all that the base model's metrics depend on.

    Args:
        model: The PEFT model, whose adapter changes nothing yet: its frozen weights count.
        spec: Its quantization, precision and evaluation count.
        plan: How the numbers are computed.
        tokenizer: What reads answers.
        rows: The held-out rows.
        prompts: The rows to answer, with their labels.
    """
    manifest = spec.manifest()
    generation = {key: value for key, value in manifest["evaluation"]["generation"].items() if key != "publishAnswers"}
    how = {key: value for key, value in plan.manifest().items() if key not in _TOLD_ONLY}
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return {
        "weights": digest_of_weights(model),
        "config": _configuration(model.config),
        "tokenizer": _sha256([_vocabulary(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id]),
        "rows": digest_of(rows),
        "prompts": _sha256([[each.prompt, str(each.label)] for each in prompts]),
        "evaluation": [manifest["evaluation"]["metrics"], generation],
        "quantization": manifest["quantization"],
        "precision": spec.training.precision,
        "plan": how,
        "device": device,
        "code": code_version(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
    }


def digest_of_weights(model: Any) -> str:
    """Return a digest of the weights and buffers of `model` without its adapter, by name, computed where they lie."""
    found = hashlib.sha256()
    adapter = {name for name, each in model.named_parameters() if each.requires_grad and ".lora_" in name}
    frozen = [(name, each) for name, each in model.named_parameters() if name not in adapter]  # trained biases too
    for name, tensor in [*frozen, *model.named_buffers()]:
        state: Any = getattr(tensor, "quant_state", None)
        states = state.as_dict() if state else {}
        scales = {f"{name}.{key}": each for key, each in states.items() if isinstance(each, torch.Tensor)}
        for key, each in {name: tensor, **scales}.items():
            found.update(f"{key} {each.dtype} {list(each.shape)} {_sums(each.data)}\n".encode())
    return found.hexdigest()


def _sums(tensor: torch.Tensor) -> list[int]:
    """Return the sum of the words of `tensor`, and that of their products with numbers of their places; modulo 2^64."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    whole = len(flat) // 8 * 8
    words, rest = flat[:whole].view(torch.int64), flat[whole:]
    totals = [int(rest.sum(dtype=torch.int64)), 0]
    for begin in range(0, len(words), _CHUNK):
        part = words[begin : begin + _CHUNK]
        places = torch.arange(begin, begin + len(part), device=part.device)
        totals[0] += int(part.sum())
        totals[1] += int((part * (2 * places * _STEP + 1)).sum())
    return [each % 2**64 for each in totals]


def _configuration(config: Any) -> str:
    """Return a digest of what a model does with its weights: its norms' epsilon, scales, caps, experts of a token."""
    values = json.loads(config.to_json_string(use_diff=False))
    return _sha256({name: value for name, value in values.items() if name not in _FROM})


def _is_metric(item: tuple[str, Any]) -> bool:
    name, value = item
    return (name in _NAMES or name.startswith(_COUNTS)) and isinstance(value, float) and math.isfinite(value)


def _vocabulary(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else [type(tokenizer).__name__, tokenizer.get_vocab()]


@cache
def code_version() -> str:
    """Return a digest of the trainer's own sources: another version may measure otherwise."""
    found, root = hashlib.sha256(), Path(finetune_trainer.__file__).parent
    for file in sorted(root.rglob("*.py")):
        found.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found.hexdigest()


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
