"""Find and replace modules of a transformers model."""

from collections.abc import Callable, Sequence
from typing import Any

from finetune_trainer.errors import ConfigInvalid


def decoder_layers(model: Any) -> list[Any]:
    """The layers of a transformers model that repeat, in order. Raises ConfigInvalid when it does not name them."""
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if names & {each.__name__ for each in type(module).__mro__}]
    if not layers:
        raise ConfigInvalid("spec.model.source: this model's code does not name its layers (_no_split_modules)")
    return layers


def replace_modules(layers: Sequence[Any], wanted: Callable[[Any], bool], make: Callable[[Any], Any]) -> None:
    """Put what `make` makes of it in the place of each module within `layers` that is `wanted`; one after another, so
    that never more than one weight lies in memory in both forms."""
    for layer in layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if wanted(child):
                    setattr(parent, name, make(child))
