"""The model card: README.md of a published adapter, with the front matter that hubs read."""

import re
from collections.abc import Iterator, Mapping
from typing import Final

import yaml

from finetune_api.spec import FineTuneJob

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


def render(job: FineTuneJob, metrics: Mapping[str, float], base_model: str, pad_token: str | None) -> str:
    """Return the text of README.md.

    Args:
        job: The job, with every default filled in.
        metrics: Final metrics, those of the base model as `<name>Before`.
        base_model: The base model's hub id or URI.
        pad_token: The tokenizer's; no loss was taken on it.
    """
    name = job.metadata.name
    front = yaml.safe_dump(
        {
            "base_model": base_model,
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            "tags": ["lora", "qlora"],
        },
        sort_keys=False,
    )
    parts = [
        f"---\n{front}---\n\n# {name}",
        f"A LoRA adapter for `{base_model}`, trained by a FineTuneJob of this name. "
        "`training/` holds the resolved job, the metrics of every step, the environment and the log.",
        "## Results\n\n" + "\n".join(_results(metrics)),
        *_confusion(metrics),
        "![Loss over steps](training/loss.png)",
        "## Training\n\n" + "\n".join(f"- {key}: {value}" for key, value in _settings(job, pad_token)),
        _usage(job, base_model),
    ]
    return "\n\n".join(parts) + "\n"


def render_artifact(job: FineTuneJob, artifact: str, base_model: str, loss: float | None) -> str:
    """Return the README.md of what was made of the adapter of `job` besides."""
    front = yaml.safe_dump({"base_model": base_model, "pipeline_tag": "text-generation"}, sort_keys=False)
    compared = f", and compared with it on held-out rows (loss {loss:.4f} nats per token)" if loss is not None else ""
    return (
        f"---\n{front}---\n\n# {job.metadata.name}, {artifact}\n\n`{base_model}` with the adapter of the FineTuneJob"
        f" `{job.metadata.name}`, which lies at `{job.spec.output.uri}`. It was loaded back{compared}. `training/`"
        " holds the job and how it was trained.\n"
    )


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


def _settings(job: FineTuneJob, pad_token: str | None) -> Iterator[tuple[str, object]]:
    spec = job.spec
    weighted = {source.uri: source.weight for source in spec.dataset.sources or ()}
    sources = [f"`{uri}` × {weight:g}" for uri, weight in weighted.items()] or [f"`{spec.dataset.train}`"]
    yield "training rows", ", ".join(sources)
    if spec.dataset.eval:
        yield "held-out rows", f"`{spec.dataset.eval}`"
    if spec.dataset.eval_fraction:
        yield "held-out rows", f"{spec.dataset.eval_fraction:g} of the training rows"
    yield "padding token", f"{_as_text(pad_token or 'none')}, masked by its position: never learned"
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


def _usage(job: FineTuneJob, base_model: str) -> str:
    name, spec = job.metadata.name, job.spec
    grown = _GROWN if spec.dataset.add_tokens else ""
    whole = spec.lora.modules_to_save or spec.lora.embeddings
    served = _MERGE if whole else _serve(name, base_model, spec.lora.rank)
    return f"""## Use

Download the adapter to `./{name}` (it lies at `{spec.output.uri}`), then with PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base_model}")
tokenizer = AutoTokenizer.from_pretrained("./{name}")
{grown}model = PeftModel.from_pretrained(base, "./{name}")
```

{served}"""


def _serve(name: str, base_model: str, rank: int) -> str:
    return f"""or with vLLM:

```sh
vllm serve {base_model} --enable-lora --max-lora-rank {rank} --lora-modules {name}=./{name}
```"""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
