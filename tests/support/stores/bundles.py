"""An adapter to publish, and the output it goes to, whatever the store."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_api.spec import Metadata
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.stores.base import Store


def bundle_of(folder: Path, files: Mapping[str, bytes]) -> Bundle:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return Bundle(folder, ARTIFACTS["Adapter"], "org/base", rank=8, metrics={"evalLoss": 0.5}, step=3)


def output(store: Store, uid: str = "1", **options: Any) -> AdapterOutput:
    return AdapterOutput(store, Metadata(name="nli", uid=uid), **options)
