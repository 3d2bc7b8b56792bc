"""Which linear layers a gradient of text reaches, rehearsed on a model without memory: its graph alone tells.

Some do nothing for text: attention to an encoder that is not there, an indexer whose choice has no gradient.
"""

import copy
import re
from collections.abc import Iterable
from types import MethodType
from typing import Any, Final

import structlog

from finetune_api.spec_training import Lora
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.architecture import missing_kernels
from finetune_trainer.planning.refusals import LAYERS
from finetune_trainer.runtime.patches import swap_forward

log = structlog.get_logger(__name__)
#: Tokens of a row: some code loops over them.
_SHORT: Final = 4
#: Some layers are for long rows alone.
_LONG: Final = 4096


def unreached(skeleton: Any, lora: Lora, layers: Iterable[str]) -> list[str]:
    """Return regular expressions of the layers that get no adapter, for it would do nothing, and log them.

    Raises:
        ConfigInvalid: When the spec asks for none but those.
    """
    layers = list(layers)
    names = unreached_layers(skeleton, layers)
    if not names:
        return []
    reached = sorted(set(layers) - set(names))
    wanted = [lora.target_pattern] if lora.target_pattern else lora.target_modules
    ends = wanted if lora.target_pattern else [rf"(.*\.)?{re.escape(name)}" for name in wanted]
    if wanted != ["all-linear"] and not any(re.fullmatch(end, name) for end in ends for name in reached):
        raise ConfigInvalid(
            f"spec.lora.{'targetPattern' if lora.target_pattern else 'targetModules'}: no gradient of text reaches"
            f" {', '.join(wanted)}; it reaches {', '.join(sorted({each.rpartition('.')[2] for each in reached}))}"
        )
    log.warning(
        f"spec.lora: no gradient of text reaches {len(names)} layers, which get no adapter, for example {names[0]}"
    )
    return _patterns(names, reached)


def unreached_layers(skeleton: Any, layers: Iterable[str]) -> list[str]:
    """Return those of `layers` that no gradient of the model's answer to text reaches, however long the text is.

    Args:
        skeleton: A causal language model on the meta device; it stays as it is.
        layers: The full names of linear layers.

    Returns:
        [] where it cannot be known: for code that looks at numbers, which are not there, or wants kernels that are not
        installed. Layers of the dense types that `planning.refusals` lists are all reached, as tests/models holds.
    """
    config, found = skeleton.config, list(layers)
    if getattr(config, "model_type", None) in LAYERS or missing_kernels(skeleton):
        return []
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or _LONG
    rehearsed = copy.deepcopy(skeleton).eval()  # dropped layers are reached another time
    try:
        for tokens in (_SHORT, min(positions // 2, _LONG)):
            if found:
                found = _without_gradient(rehearsed, found, tokens)
    except Exception:  # transformers' own code runs on what has no numbers, so anything can go wrong
        return []
    return found


def _without_gradient(model: Any, layers: list[str], tokens: int) -> list[str]:
    import torch

    from finetune_trainer.model.experts import is_experts

    weights = {name: model.get_submodule(name).weight for name in layers}
    for each in model.parameters():
        each.requires_grad_(False)
    for each in weights.values():
        each.requires_grad_(True)
    for module in model.modules():
        if is_experts(module):
            swap_forward(module, MethodType(_any_experts, module))
    model.set_attn_implementation("eager")  # the others look at the mask's numbers
    with torch.device("meta"):
        row = torch.ones(1, tokens, dtype=torch.long)
        answer = model(input_ids=row, attention_mask=row, use_cache=False).logits
    if answer.requires_grad:
        answer.float().sum().backward()
    return [name for name, each in weights.items() if each.grad is None]


def _any_experts(_: Any, hidden: Any, *routing: Any) -> Any:
    """Depend on what experts depend on: which of them are chosen is no matter of gradients."""
    return hidden + sum(each.sum() for each in routing if each.is_floating_point())


def _patterns(names: list[str], reached: Iterable[str]) -> list[str]:
    """Return regular expressions of `names`: one for those of all layers, where it matches none of `reached`."""
    found = []
    for name in names:
        all_layers = re.sub(r"\d+", r"\\d+", re.escape(name))
        found.append(re.escape(name) if any(re.fullmatch(all_layers, each) for each in reached) else all_layers)
    return list(dict.fromkeys(found))
