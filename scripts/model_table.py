"""Write docs/models.md: what the trainer does with each causal language model type of transformers, measured tiny."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

HEAD = """# Models

Every type of causal language model that transformers {version} has, and some multimodal ones, as tiny random models:
measured by `python scripts/model_table.py`, proven by `tests/models` (one of each kind with `make test`, all of them
with `make test-nightly`).

- **Trains**: a step runs, and the loss is that of transformers' own logits. The trainer proves it anew of every model
  that it loads: `own` says that it takes the model's own logits, for its head is not where others have it.
- **Packed**: rows laid end to end give what they give alone. Elsewhere `training.packing: auto` pads, and `enabled` is
  refused.
- **Layers**: whether the decoder layers are found, so that they can be checkpointed and compiled.
- **Compiled**: whether compiled layers give the same loss and the same gradients; `make test-nightly` traces each type
  with torch.compile, without its kernels (backend `aot_eager`), and compares. Where compiling fails a run goes on
  without, and says so. `kernels`: not without those that are named below, for torch's loops over tokens would be
  compiled token by token; with them it is not measured here.
- **In 4 bits**: the part of the weights, embeddings and head apart, that `quantization.bits: 4` quantizes,
  [experts](#experts) included. `tests/models` takes the same step in 4 bits, on the CPU. Weights that kernels read past
  their layer (Mamba's `out_proj`) stay in 16 bits. `refused`: RWKV and RoCBert train in 16 bits only.
- **Planned**: `exact` where `finetune plan` counts the weights by a table, at once. Of other types it builds the model
  without memory where torch is installed, in seconds, and else estimates; the trainer always counts them itself.

Of some types not all linear layers can have an adapter:

- Layers whose adapter would not load back, for transformers renames checkpoints of the type and PEFT renames adapters
  likewise, get none, and the log says so: shared experts of `laguna`, convolutions of `inkling2_text`. Whatever the
  type, an adapter whose weights differ once it is loaded back is never published.
- Layers that no gradient of text reaches get none: attention to an encoder that is not there, the indexers of sparse
  attention, towers for images. A pass over the model's graph, without weights or memory, finds them before the weights
  load, and the log says so. Where that cannot be told ahead they keep an adapter that does nothing: the log says so
  when it is published, and `spec.lora.targetPattern` leaves them out:
{unreached}

Models with linear attention, convolutions or state spaces (Qwen3.5, Qwen3-Next, Kimi-Linear, Nemotron-H, Mamba, LFM)
use the kernels of `flash-linear-attention`, `causal-conv1d` and `mamba-ssm` where those can be imported: the extra
`linear-attention`, and `LINEAR_ATTENTION=1` for the [trainer image](install.md). Without them torch computes the same
much more slowly, the log names what is missing, and rows are padded where only the kernels keep packed ones apart.

| Family | Trains | Packed | Layers | Compiled | In 4 bits | Planned |
| --- | --- | --- | --- | --- | --- | --- |
"""

EXPERTS = """
## Experts

Where transformers keeps the experts of a layer as one parameter, each expert's matrix is quantized while it loads, bit
for bit as bitsandbytes quantizes linear layers. Tokens are sorted by expert and multiplied in grouped products; so are
the adapters on experts (`gate_proj`, `up_proj`, `down_proj` in `lora.targetModules`, for families that PEFT knows).
`quantization.bits: 8` (LLM.int8) leaves experts in 16 bits, and so do weights that are stored in 4 bits.

| Layout | Families |
| --- | --- |
"""


def row(kind: str) -> str:
    """Return the table's row for one type."""
    from support.trainer import family_report

    if reason := family_report.not_built(kind):
        return f"| `{kind}` | not measured: {reason} | | | | | |"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cells = _measured(kind)
    return f"| `{kind}` | {' | '.join(cells)} |"


def layout_rows() -> list[str]:
    """Return the rows of the table of experts."""
    from support.trainer.expert_layouts import layouts

    return [f"| {layout} | {', '.join(f'`{kind}`' for kind in kinds)} |" for layout, kinds in layouts().items()]


def unreached() -> str:
    """Return a list of the types with layers that no gradient reaches, by the names of those layers."""
    from support.trainer.family_report import UNREACHED

    return "\n".join(
        f"  - {layers}: {', '.join(f'`{kind}`' for kind, other in sorted(UNREACHED.items()) if other == layers)}"
        for layers in dict.fromkeys(UNREACHED.values())
    )


def _measured(kind: str) -> list[str]:
    from finetune_trainer.engine.modules import decoder_layers
    from finetune_trainer.engine.proof import prove
    from finetune_trainer.errors import ConfigInvalid
    from finetune_trainer.model.counts import count_weights
    from finetune_trainer.planning.parameters import count
    from support.trainer import family_report
    from support.trainer.families import tiny_model

    model = tiny_model(kind)
    try:
        findings = prove(model, family_report.SPEC, family_report.plan(model), family_report.ROWS, 0)
    except ConfigInvalid as error:
        return [f"refused: {_short(error)}", "", "", "", "", ""]
    try:
        named = bool(decoder_layers(model))
    except ConfigInvalid:
        named = False
    weights = count_weights(model)
    tables = {id(each): each.numel() for each in _tables(model)}
    body = weights.total - sum(tables.values())
    return [
        "own" if findings.own_loss else "yes",
        "padded" if findings.packing_problem else "yes",
        "yes" if named else "no",
        family_report.compiled(kind, model),
        _in_4_bits(kind, (weights.linear + weights.experts) / max(1, body)),
        "exact" if count(model.config.to_dict()) == weights else "estimate",
    ]


def _in_4_bits(kind: str, part: float) -> str:
    from finetune_trainer.errors import ConfigInvalid
    from finetune_trainer.planning.refusals import check_config
    from support.trainer.family_report import FOUR_BITS

    try:
        check_config({"model_type": kind}, FOUR_BITS)
    except ConfigInvalid:
        return "refused"
    return f"{part:.0%}"


def _tables(model: Any) -> list[Any]:
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [each.weight for each in found if each is not None]


def _short(error: Exception) -> str:
    return (
        str(error)
        .removeprefix("spec.model.source: ")
        .replace(" in hf://org/base", "")
        .replace("hf://org/base ", "")
        .partition(":")[0]
    )


def main() -> None:
    """Write the page."""
    import transformers

    from support.trainer.families import causal_types

    transformers.logging.set_verbosity_error()
    rows = [row(kind) for kind in causal_types()]
    version = ".".join(transformers.__version__.split(".")[:2])
    page = HEAD.format(version=version, unreached=unreached()) + "\n".join(rows) + "\n"
    page += EXPERTS + "\n".join(layout_rows()) + "\n"
    (ROOT / "docs/models.md").write_text(page)


if __name__ == "__main__":
    main()
