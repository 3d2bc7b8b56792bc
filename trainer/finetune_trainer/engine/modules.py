"""Find and replace modules of a transformers model."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.architecture import language_part


def decoder_layers(model: Any) -> list[Any]:
    """Return the layers of the language part of a transformers model, in order.

    Raises:
        ConfigInvalid: When it has none that can be told.
    """
    return repeated_layers(model.get_submodule(language_part(model)), model._no_split_modules)


def repeated_layers(part: Any, names: Iterable[str] | None) -> list[Any]:
    """Return the layers in `part` of a transformers model, in order, and none that lies in another.

    They are what transformers itself can checkpoint; other code only says what must not be split over devices.

    Args:
        part: The model, or a module in it.
        names: Classes that must not be split.

    Raises:
        ConfigInvalid: When there are none.
    """
    known, modules = set(names or ()), list(part.modules())
    found = [each for each in modules if isinstance(each, GradientCheckpointingLayer)] or [
        each for each in modules if known & {base.__name__ for base in type(each).__mro__}
    ]
    inside = {inner for layer in found for inner in layer.modules() if inner is not layer}
    layers = [layer for layer in found if layer not in inside]
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
