"""The last check: load what was published, as a user would, and see that it computes what was trained."""

import shutil
from pathlib import Path
from typing import Any

import structlog
from peft import PeftModel

from finetune_api import names
from finetune_api.spec import FineTuneJob
from finetune_trainer.evaluate import Evaluator
from finetune_trainer.store import Store

log = structlog.get_logger(__name__)
#: The same weights on the same base differ by rounding alone.
TOLERANCE = 1e-3


class VerificationFailed(Exception):
    """The published adapter does not compute what was trained; it has been withdrawn."""


def verify(store: Store, job: FineTuneJob, model: Any, evaluator: Evaluator, expected: float, folder: Path) -> None:
    """Fetch the adapter from `store`, load it with PEFT on the base of `model`, compare its loss with `expected`.

    `model` is taken apart for it. `expected` is evaluator.loss_of before publishing. Whatever goes wrong, the manifest
    is deleted first, so that no reader takes the adapter for whole; a difference raises VerificationFailed.
    """
    try:
        found = _loss_of_published(store, model, evaluator, folder)
        if not abs(found - expected) <= TOLERANCE * max(1.0, abs(expected)):
            raise VerificationFailed(
                f"The adapter at {job.spec.output.uri}, loaded back, has loss {found:.6f} where training ended with"
                f" {expected:.6f}; it was withdrawn"
            )
    except Exception:
        store.delete(names.MANIFEST_FILE)
        raise
    log.info("The published adapter was loaded back with PEFT and computes the same", loss=round(found, 6))


def _loss_of_published(store: Store, model: Any, evaluator: Evaluator, folder: Path) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    for name in (names.ADAPTER_CONFIG_FILE, names.ADAPTER_WEIGHTS_FILE):
        store.download(name, folder / name)
    base = model.unload()
    return evaluator.loss_of(PeftModel.from_pretrained(base, str(folder)))
