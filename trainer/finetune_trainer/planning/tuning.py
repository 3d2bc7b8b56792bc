"""Whether training is long enough for the compiler to try out tiles. Pure, importable without torch."""

from collections.abc import Sequence
from typing import Final

from finetune_api.spec_training import Training
from finetune_trainer.planning.model_shape import ModelShape

#: Tokens times weights from which it pays, some three hours on an H200: it saves 0.5 % of a step and takes 20 to 50 s.
_PAYS_FROM: Final = 1.5e18


def pays(training: Training, lengths: Sequence[int], shape: ModelShape | None) -> bool:
    """Return whether tuned tiles save more time than it takes to find them. Either way the sums are the same.

    Args:
        training: Says how many steps there are; those that an earlier attempt has done count, so that all decide alike.
        lengths: The length of each training row in tokens.
        shape: The model; one that these numbers do not describe is not tuned for.
    """
    if shape is None or not lengths:
        return False
    rows = training.max_steps * training.batch_size if training.max_steps else training.epochs * len(lengths)
    return rows * sum(lengths) / len(lengths) * shape.active_weights >= _PAYS_FROM
