"""Compare a whole model that was made of an adapter with the trained one, by its loss on held-out rows."""

from collections.abc import Callable
from typing import Any

import structlog
import torch

from finetune_trainer.publishing.artifact import Losses, LossMeter, VerificationFailed

log = structlog.get_logger(__name__)


def compare_loss(
    what: str, meter: LossMeter, expected: float, load: Callable[[str], Any], device: str, tolerance: float
) -> Losses:
    """Load the model and measure it; on the CPU if the GPU is too small for it beside the trained one.

    Args:
        what: The subject of messages, such as 'The merged model at s3://...'.
        meter: Measures the loss.
        expected: The trained model's.
        load: Loads the model onto a device, as a user's program does.
        device: torch's name of the device.
        tolerance: What its rounding may change of a loss, as a part of it.

    Raises:
        VerificationFailed: The loss is another one.
    """
    try:
        found = meter.own_loss_of(load(device))
    except torch.OutOfMemoryError:
        log.warning(f"{what} does not fit the GPU beside the trained one: it is checked on the CPU")
        torch.cuda.empty_cache()
        found = meter.own_loss_of(load("cpu"))
    if not abs(found - expected) <= tolerance * max(1.0, abs(expected)):
        raise VerificationFailed(
            f"{what}, loaded back, has loss {found:.6f} where the trained one has {expected:.6f}; it is not published"
        )
    log.info(f"{what} was loaded back", loss=round(found, 6), adapter=round(expected, 6))
    return Losses(expected, found)
