"""How many weights a model has, by what becomes of them in 4 bits."""

from typing import Any

from finetune_trainer.model.architecture import is_plain_linear, linear_modules, read_past
from finetune_trainer.planning.parameters import Counts


def count_weights(model: Any) -> Counts:
    """Return the weights of `model`, by what becomes of them in 4 bits; those that layers share count once."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    from finetune_trainer.model.experts import experts_of

    kept = {*HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules), *read_past(model)}
    # Transformers also keeps what comes last: here, where a tied head does not count, another layer than at load.
    (last, _), (last_at_load, _) = ([*model.named_parameters(remove_duplicate=each)][-1] for each in (True, False))
    if last != last_at_load:
        kept.discard(last.removesuffix(".weight"))
    named = [(name, each) for name, each in linear_modules(model) if should_convert_module(name, list(kept))]
    packed = [each for _, each in named if is_plain_linear(type(each))]
    linear = sum({each.weight: each.weight.numel() for each in packed}.values())
    experts = sum(each.numel() for _, _, each in experts_of(model))
    return Counts(linear, experts, sum(each.numel() for each in model.parameters()) - linear - experts)
