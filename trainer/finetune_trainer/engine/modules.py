"""Find and replace modules of a transformers model."""

from collections.abc import Callable, Sequence
from typing import Any

from finetune_trainer.errors import ConfigInvalid


def decoder_layers(model: Any) -> list[Any]:
    """Return the decoder layers of a transformers model, in order.

    Raises:
        ConfigInvalid: When the model does not name them.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if names & {each.__name__ for each in type(module).__mro__}]
    if not layers:
        raise ConfigInvalid("spec.model.source: this model's code does not name its layers (_no_split_modules)")
    return layers


def replace_modules(layers: Sequence[Any], predicate: Callable[[Any], bool], factory: Callable[[Any], Any]) -> None:
    """Replace each submodule matching `predicate` with `factory(module)`, one at a time.

    Never more than one weight is in memory in both forms.
    """
    for layer in layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if predicate(child):
                    setattr(parent, name, factory(child))
