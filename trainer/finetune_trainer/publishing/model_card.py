"""The model card: README.md of a published adapter, with the front matter that hubs read."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from finetune_api.artifact_manifest import Lineage
from finetune_api.spec import FineTuneJob
from finetune_api.uri import parse

_CONFUSION: Final = "confusion."
_ROWS = (
    ("evalLoss", "held-out loss (nats per token)"),
    ("accuracy", "accuracy"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("f1", "F1"),
    ("validJson", "valid JSON"),
)

_GROWN: Final = """if len(tokenizer) > base.get_input_embeddings().num_embeddings:
    base.resize_token_embeddings(len(tokenizer))
"""
_MERGE: Final = (
    "vLLM serves no adapter whose modules were trained whole: merge it first (`model.merge_and_unload()`), and save"
    " the model."
)
#: Names that hubs know, for ours.
_HUB_METRICS: Final = {"evalLoss": "loss", "validJson": "valid-json"}
_VLLM_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Facts:
    """What the card tells beside the job and its metrics.

    Attributes:
        base_model: The base model's hub id or URI.
        commit: The hub's commit of it, None for other sources.
        pad_token: The tokenizer's; no loss was taken on it.
        row_format: The format that the training rows were read in.
        environment: Versions and hardware, as in training/environment.json.
        train_seconds: Time of the training steps.
        world_size: GPUs, or processes on a CPU.
        lineage: What the adapter was made of.
    """

    base_model: str
    commit: str | None = None
    pad_token: str | None = None
    row_format: str = "text"
    environment: Mapping[str, Any] = field(default_factory=dict)
    train_seconds: float = 0.0
    world_size: int = 1
    lineage: Lineage | None = None


def render(job: FineTuneJob, metrics: Mapping[str, float], facts: Facts) -> str:
    """Return the text of README.md.

    Args:
        job: The job, with every default filled in.
        metrics: Final metrics, those of the base model as `<name>Before`.
        facts: What else there is to tell.
    """
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(job, metrics, facts), sort_keys=False)}---\n\n# {job.metadata.name}",
        f"A LoRA adapter for `{facts.base_model}`, trained by a FineTuneJob of this name. "
        "`training/` holds the resolved job, the metrics of every step, the environment and the log.",
        usage(job, facts),
        "## Results\n\n" + "\n".join(_results(metrics)),
        *_confusion(metrics),
        "![Loss over steps](training/loss.png)",
        "## Training\n\n" + "\n".join(f"- {key}: {value}" for key, value in _settings(job, facts)),
        *_lineage(facts.commit, facts.lineage),
        "## License\n\nAn adapter is derived from its base model and its training data: the license of "
        f"`{facts.base_model}` and the terms of the data apply. Name yours in `license` above before you share it.",
    ]
    return "\n\n".join(parts) + "\n"


def render_artifact(job: FineTuneJob, artifact: str, base_model: str, loss: float | None) -> str:
    """Return the README.md of what was made of the adapter of `job` besides."""
    front = yaml.safe_dump(
        _base_on_hub(job, base_model, "finetune") | {"pipeline_tag": "text-generation"}, sort_keys=False
    )
    compared = f", and compared with it on held-out rows (loss {loss:.4f} nats per token)" if loss is not None else ""
    return (
        f"---\n{front}---\n\n# {job.metadata.name}, {artifact}\n\n`{base_model}` with the adapter of the FineTuneJob"
        f" `{job.metadata.name}`, which lies at `{job.spec.output.uri}`. It was loaded back{compared}. `training/`"
        " holds the job and how it was trained.\n"
    )


def _base_on_hub(job: FineTuneJob, base_model: str, relation: str) -> dict[str, Any]:
    """Return what a hub is told of the base model: nothing of one that lies elsewhere, for it takes ids alone."""
    if parse(job.spec.model.source).scheme != "hf":
        return {}
    return {
        "base_model": base_model,
        "base_model_relation": relation,
        "license": "other",
        "license_name": "that-of-the-base-model",
        "license_link": f"https://huggingface.co/{base_model}",
    }


def _front_matter(job: FineTuneJob, metrics: Mapping[str, float], facts: Facts) -> dict[str, Any]:
    """Return what hubs read. They take ids of their own for a base model and data sets, and no other place."""
    data = [parse(uri) for uri in job.spec.dataset.uris.values()]
    front = _base_on_hub(job, facts.base_model, "adapter")
    if datasets := sorted({uri.authority for uri in data if uri.is_dataset}):
        front["datasets"] = datasets
    front |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "qlora", "finetune-operator"]}
    measured = [
        {"type": _HUB_METRICS.get(key, key), "name": label, "value": round(metrics[key], 6)}
        for key, label in _ROWS
        if key in metrics
    ]
    if measured:
        spec = job.spec.dataset
        held_out = spec.eval or f"{spec.eval_fraction or 0:g} of the training rows"
        places = [parse(uri) for uri in [spec.eval or spec.train] if uri]
        kind = next((uri.authority for uri in places if uri.is_dataset), "private")
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"type": kind, "name": held_out},
            "metrics": measured,
        }
        front["model-index"] = [{"name": job.metadata.name, "results": [result]}]
    return front


def _results(metrics: Mapping[str, float]) -> Iterator[str]:
    yield "| | before | after |"
    yield "| --- | --- | --- |"
    for key, label in _ROWS:
        if key in metrics:
            yield f"| {label} | {_number(metrics.get(f'{key}Before'))} | {_number(metrics[key])} |"
    if "trainLoss" in metrics:
        yield f"| training loss (nats per token) | | {_number(metrics['trainLoss'])} |"


def _confusion(metrics: Mapping[str, float]) -> Iterator[str]:
    counts = {key.removeprefix(_CONFUSION): value for key, value in metrics.items() if key.startswith(_CONFUSION)}
    right = sorted(_labels(counts))
    if not right:
        return
    read = [*right, "none"]
    lines = [
        "| right label | " + " | ".join(f"answered {_as_text(label)}" for label in read) + " |",
        "| --- " * (len(read) + 1) + "|",
    ]
    lines += [
        f"| {_as_text(label)} | " + " | ".join(str(int(counts.get(f"{label}.{other}", 0))) for other in read) + " |"
        for label in right
    ]
    yield "Confusion matrix (held-out rows):\n\n" + "\n".join(lines)


def _labels(pairs: Mapping[str, float]) -> Iterator[str]:
    """Yield the labels of the pairs '<right>.<read>'. A label may hold a dot; each is paired with itself."""
    for pair in pairs:
        label, other = pair[: len(pair) // 2], pair[len(pair) // 2 :]
        if other == f".{label}":
            yield label


def _as_text(given: str) -> str:
    """Return what data or a user gave as text of Markdown: no markup, HTML, link or end of line comes of it."""
    shown = "".join(character if character.isprintable() else " " for character in given)
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in " ".join(shown.split()))


def _settings(job: FineTuneJob, facts: Facts) -> Iterator[tuple[str, object]]:
    spec = job.spec
    weighted = {source.uri: source.weight for source in spec.dataset.sources or ()}
    sources = [f"`{uri}` × {weight:g}" for uri, weight in weighted.items()] or [f"`{spec.dataset.train}`"]
    yield "training rows", ", ".join(sources)
    if spec.dataset.eval:
        yield "held-out rows", f"`{spec.dataset.eval}`"
    if spec.dataset.eval_fraction:
        yield "held-out rows", f"{spec.dataset.eval_fraction:g} of the training rows"
    yield "padding token", f"{_as_text(facts.pad_token or 'none')}, masked by its position: never learned"
    quantization, lora, training = spec.quantization, spec.lora, spec.training
    double = " with double quantization" if quantization.double_quant else ""
    yield "base weights", f"{quantization.type}{double}" if quantization.bits == 4 else f"{quantization.bits} bits"
    variants = [name for name, wanted in (("rsLoRA", lora.rslora), ("DoRA", lora.dora)) if wanted]
    yield "adapter", ", ".join([f"rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout}", *variants])
    targets = [lora.target_pattern] if lora.target_pattern else lora.target_modules
    modules = (name if re.fullmatch(r"[A-Za-z0-9_.-]+", name) else _as_text(name) for name in targets)
    yield "target modules", ", ".join(modules)
    if lora.layers_to_transform:
        yield "decoder layers", ", ".join(map(str, lora.layers_to_transform))
    whole = [*(_as_text(name) for name in lora.modules_to_save or ()), *["embeddings and head"] * lora.embeddings]
    if whole:
        yield "trained whole", ", ".join(whole)
    if tokens := spec.dataset.add_tokens:
        yield "new tokens", ", ".join(_as_text(token) for token in tokens)
    yield "epochs", training.epochs
    if training.max_steps:
        yield "steps at most", training.max_steps
    yield "effective batch", f"{training.batch_size} sequences of up to {training.max_length} tokens"
    yield "optimizer", f"{training.optimizer}, learning rate {training.learning_rate:g}, {training.scheduler}"
    yield "precision, seed", f"{training.precision}, {training.seed}"
    gpus = facts.environment.get("gpus") or []
    yield "hardware", f"{facts.world_size} × {_as_text(gpus[0])}" if gpus else "CPU"
    hours = facts.train_seconds * facts.world_size / 3600
    yield ("GPU-hours" if gpus else "hours"), f"{hours:.2f} in training steps"
    versions = facts.environment.get("packages") or {}
    yield (
        "versions",
        ", ".join(f"{_as_text(name)} {_as_text(version)}" for name, version in versions.items()) or "unknown",
    )


def usage(job: FineTuneJob, facts: Facts) -> str:
    """Return the section that loads the adapter and asks it, as it works in the adapter's own folder."""
    name, spec = job.metadata.name, job.spec
    source = parse(spec.model.source)
    base = {"hf": facts.base_model, "file": source.path}.get(source.scheme, "./base")
    fetch = f" Fetch the base model from `{facts.base_model}` to `./base` first." if base == "./base" else ""
    pinned = f', revision="{facts.commit}"' if facts.commit else ""
    trusted = ", trust_remote_code=True" if spec.model.trust_remote_code else ""
    options = (f" --revision {facts.commit}" if facts.commit else "") + (" --trust-remote-code" if trusted else "")
    grown = _GROWN if spec.dataset.add_tokens else ""
    whole = spec.lora.modules_to_save or spec.lora.embeddings
    served = _MERGE if whole else _serve(name, f"{shlex.quote(base)}{options}", spec.lora.rank)
    if facts.row_format in ("messages", "sharegpt"):
        ask = """messages = [{"role": "user", "content": "Your question"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
    else:
        ask = """# The tokenizer adds the token that begins a text: do not write it yourself.
inputs = tokenizer("Your prompt, written as in the training rows", return_tensors="pt")"""
    return f"""## Use

Download the adapter from `{spec.output.uri}` and change to its folder.{fetch} Then, with PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained(
    {json.dumps(base, ensure_ascii=False)}{pinned}, dtype="auto", device_map="auto"{trusted}
)
tokenizer = AutoTokenizer.from_pretrained("."{trusted})
{grown}model = PeftModel.from_pretrained(base, ".").eval()

{ask}
output = model.generate(**inputs.to(model.device), max_new_tokens=256, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

{served}"""


def _serve(name: str, base: str, lora_rank: int) -> str:
    rank = next((size for size in _VLLM_RANKS if size >= lora_rank), lora_rank)
    return f"""or with vLLM:

```sh
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}=.
```"""


def _lineage(base_commit: str | None, lineage: Lineage | None) -> Iterator[str]:
    if lineage is None:
        return
    facts = [("base commit", base_commit), ("training rows", lineage.train_rows), ("held-out rows", lineage.eval_rows)]
    facts.append(("trained by finetune-operator", lineage.code_version))
    if parent := lineage.parent:
        facts.append(("continues", f"{parent.uri} ({parent.manifest_digest or 'without a manifest'})"))
    yield "## Lineage\n\n" + "\n".join(f"- {title}: `{value}`" for title, value in facts if value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
