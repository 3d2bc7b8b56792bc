"""What an adapter was made of: rows, code, and the adapter that training began with."""

from importlib import metadata
from pathlib import Path

from finetune_api import constants
from finetune_api.artifact_manifest import Lineage, Parent
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.checkpoints.fingerprint import digest_of
from finetune_trainer.data.dataset import Datasets
from finetune_trainer.stores import manifest


def lineage_of(spec: FineTuneJobSpec, data: Datasets, init_from: Path | None) -> Lineage:
    """Return the lineage of what is trained.

    Args:
        spec: The job's spec.
        data: The rows that were trained and evaluated on.
        init_from: The files of the adapter of lora.initFrom, as they were read.
    """
    return Lineage(
        code_version=metadata.version("finetune-operator"),
        train_rows=f"sha256:{digest_of(data.train)}",
        eval_rows=f"sha256:{digest_of(data.eval)}" if data.eval else None,
        parent=_parent(spec.lora.init_from, init_from),
    )


def _parent(uri: str | None, folder: Path | None) -> Parent | None:
    if uri is None or folder is None:
        return None
    file = folder / constants.MANIFEST_FILE
    return Parent(uri=uri, manifest_digest=manifest.digest_of(file.read_bytes()) if file.is_file() else None)
