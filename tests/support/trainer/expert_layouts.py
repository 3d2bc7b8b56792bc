"""In which forms transformers keeps the experts of a layer as one parameter, and which of them are quantized."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from finetune_trainer.model.experts import experts_of, is_experts
from support.trainer import family_report
from support.trainer.families import causal_types, tiny_config

#: Types whose first layers are dense, as many as a tiny model has.
_SPARSE = {"first_k_dense_replace": 0, "num_dense_layers": 0}


def layouts(kinds: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Return the types of causal language models by the layout of their experts, those that stay in 16 bits last."""
    found: dict[str, list[str]] = {}
    for kind in kinds or causal_types():
        for layout in sorted({_layout(module) for module in _with_experts(kind)}):
            found.setdefault(layout, []).append(kind)
    return dict(sorted(found.items(), key=lambda item: ("16 bits" in item[0], -len(item[1]))))


def _with_experts(kind: str) -> list[Any]:
    """Return the modules of a tiny model of the type `kind`, without memory, that hold experts as one parameter."""
    import torch

    from finetune_trainer.model.architecture import model_class

    if family_report.not_built(kind):
        return []
    with torch.device("meta"), contextlib.redirect_stderr(io.StringIO()):
        config = tiny_config(kind)
        for name, value in _SPARSE.items():
            if hasattr(config, name) and isinstance(getattr(config, name), int):
                setattr(config, name, value)
        model = model_class(config).from_config(config)
    return [
        module
        for module in model.modules()
        if "Experts" in type(module).__name__ and any(each.dim() == 3 for each in module.parameters(recurse=False))
    ]


def _layout(module: Any) -> str:
    names = [name for name, each in module.named_parameters(recurse=False) if each.dim() == 3]
    said = " and ".join(f"`{name}`" for name in names)
    quantized = [name for _, name, _ in experts_of(module)]
    if not is_experts(module) or sorted(quantized) != sorted(names):
        return f"{said}: 16 bits, their own code multiplies them"
    more = [
        word
        for word, is_so in (
            ("inputs by outputs", module.is_transposed),
            ("gate and up interleaved", not module.is_concatenated),
            ("biases", module.has_bias),
        )
        if is_so
    ]
    return ", ".join([said, *more])
