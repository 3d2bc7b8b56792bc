"""The last check: load what was published, as a user would, and compare it with what was trained."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_api import constants
from finetune_api.artifact_manifest import StoreManifest
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.model.base import BaseModel
from finetune_trainer.publishing.artifact import Artifact, Losses, LossMeter, Trained
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.stores import manifest as store_manifest
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.digest import Digest
from finetune_trainer.stores.errors import StoreCorrupted


class Verifier:
    """Compares an artifact with the trained model, wherever the artifact is."""

    def __init__(self, artifact: Artifact, trained: Trained, meter: LossMeter, scratch: Path) -> None:
        """Note what the trained model computes; see make_verifier."""
        self._required_files = artifact.required_files
        self._check = artifact.make_check(trained, meter)
        self._scratch = scratch
        #: Of the last check, where it compared losses.
        self.losses: Losses | None = None

    def check_local(self, folder: Path) -> None:
        """Check the artifact in `folder`, before it is uploaded. Raises VerificationFailed."""
        self.losses = self._check(folder, "hand")

    def check_uploaded(self, output: AdapterOutput, digests: Mapping[str, Digest]) -> None:
        """Download the artifact's files from `output` and check them. Raises VerificationFailed, StoreError."""
        _fetch(output.store, {name: digests[name].sha256 for name in self._required_files}, self._scratch)
        self.losses = self._check(self._scratch, str(output.store.root))


def make_verifier(
    model: Any, base: BaseModel, meter: LossMeter, plan: ExecutionPlan, spec: FineTuneJobSpec, scratch: Path
) -> Verifier:
    """Note what the trained `model` computes, to compare the published adapter with it.

    Args:
        model: The trained PEFT model, with the weights that are published; the first check takes it apart.
        base: The base model.
        meter: Measures the loss on some rows, on this process alone.
        plan: With sharded or fp8 weights this process cannot compute what a user's will: weights are compared.
        spec: The job's spec.
        scratch: A folder to download to.

    Raises:
        Diverged: The adapter computes, or holds, NaN or infinite numbers.
    """
    return Verifier(ARTIFACTS["Adapter"], Trained(spec, model, base, plan), meter, scratch)


def load_back(output: AdapterOutput, folder: Path) -> StoreManifest:
    """Download an artifact that an earlier attempt published to `folder`, and load it, without a base model.

    What its training measured comes along.

    It was compared with the trained model before its manifest was written (publishing.publish). Its bytes are compared
    with that manifest here: they are the bytes that passed.

    Returns:
        Its manifest.

    Raises:
        StoreCorrupted: The artifact is gone, or cannot be of use.
    """
    store = output.store
    found = store_manifest.read(store)
    artifact = ARTIFACTS.get(found[0].kind) if found else None
    if found is None or artifact is None:
        raise StoreCorrupted(f"{store.field}: {store.root} holds no adapter any more")
    manifest, _ = found
    wanted = (*artifact.required_files, constants.METRICS_FILE)
    _fetch(store, {file.path: file.sha256 for file in manifest.files if file.path in wanted}, folder)
    try:
        artifact.load(folder, str(store.root))
    except StoreCorrupted as error:
        raise StoreCorrupted(f"{store.field}: {error}") from None
    return manifest


def _fetch(store: Store, digests: Mapping[str, str], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, sha256 in digests.items():
        store.download(name, folder / name, sha256=sha256)
