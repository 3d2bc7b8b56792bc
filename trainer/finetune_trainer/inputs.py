"""What a run reads: the model's small files, its weights, data files. Small things first, so that errors show early."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog

from finetune_api.uri import Uri, parse
from finetune_trainer.data import hub_splits
from finetune_trainer.data.dataset import DataFile
from finetune_trainer.data.readers import is_data_file
from finetune_trainer.errors import ConfigInvalid, DatasetInvalid
from finetune_trainer.settings import Settings
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import BucketNotFound, StoreNotFound
from finetune_trainer.stores.fetch import fetch

log = structlog.get_logger(__name__)
#: Weights in formats that can run code when they are read, and copies for other frameworks.
_NEVER: Final = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "*.ot",
    "original/*",
    "consolidated*.safetensors",
)
_WEIGHTS: Final = "*.safetensors"
#: The splits of a hub data set that suit a field, best first.
_SPLITS: Final = {"spec.dataset.train": ("train",), "spec.dataset.eval": ("validation", "test")}


@dataclass(frozen=True)
class ModelFiles:
    """A model's files on this disk; `revision` is the hub's commit, where there is one."""

    folder: Path
    revision: str | None


class Inputs:
    """Fetches what the spec names into the shared cache, or finds it where it lies."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cache = settings.environment.cache or settings.environment.scratch / "cache"

    def model_config_and_tokenizer(self, revision: str | None = None) -> ModelFiles:
        """Everything of the model but its weights. `revision` goes before the manifest's."""
        return self._model((*_NEVER, _WEIGHTS), revision or self._settings.spec.model.revision)

    def model_weights(self, revision: str | None) -> Path:
        """The model's folder, weights included. Raises ConfigInvalid when it has none in safetensors."""
        source = self._settings.spec.model.source
        folder = self._model(_NEVER, revision).folder
        if not any(folder.glob(_WEIGHTS)):
            raise ConfigInvalid(
                f"spec.model.source: {source} has no .safetensors weights; other formats can run code and are not read"
            )
        return folder

    def shards(self, source: str, field: str) -> list[DataFile]:
        """The data files at `source`: one, or all below a prefix; of a data set on the hub, those of one split.

        Raises DatasetInvalid when there is none, or when it is not clear which are meant.
        """
        uri = parse(source)
        try:
            uri, found, split = self._data(uri, field)
        except BucketNotFound:
            raise
        except StoreNotFound as error:
            raise DatasetInvalid(str(error)) from None
        if found.is_file():
            return [DataFile(found, found.name, field)]
        every = sorted(path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file())
        paths = [path for path in every if is_data_file(path)]
        if not paths:
            raise DatasetInvalid(f"{field}: {uri} has no .jsonl, .json, .csv or .parquet file")
        if uri.scheme == "hf":
            paths = _of_split(paths, split, uri, field)
        return [DataFile(found / path, path, field) for path in paths]

    def _data(self, uri: Uri, field: str) -> tuple[Uri, Path, str]:
        """`uri` and what it names, and ''; where its last segment is no path but a split: those above it, and that."""
        try:
            return uri, self._fetch(uri, "dataset", field), ""
        except StoreNotFound:
            above, _, name = uri.path.rstrip("/").rpartition("/")
            if not uri.is_dataset or not name.isidentifier():
                raise
            above_it = replace(uri, path=above)
            return above_it, self._fetch(above_it, "dataset", field), name

    def adapter(self, source: str) -> Path:
        """An earlier adapter to continue from."""
        folder = self._fetch(parse(source), "model", "spec.lora.initFrom", ("checkpoints/*", "training/*"))
        if not (folder / "adapter_config.json").is_file():
            raise ConfigInvalid(f"spec.lora.initFrom: {source} holds no adapter: adapter_config.json is missing")
        return folder

    def _model(self, ignore: tuple[str, ...], revision: str | None) -> ModelFiles:
        uri = parse(self._settings.spec.model.source)
        folder = self._fetch(uri, "model", "spec.model.source", ignore, revision)
        if not (folder / "config.json").is_file():
            raise ConfigInvalid(f"spec.model.source: {uri} holds no model: config.json is missing")
        return ModelFiles(folder, _commit(folder) or revision if uri.scheme == "hf" else None)

    def _fetch(
        self, uri: Uri, role: str, field: str, ignore: tuple[str, ...] = (), revision: str | None = None
    ) -> Path:
        credentials = Credentials.for_role(role, secrets_dir=self._settings.environment.secrets)
        return fetch(
            uri,
            credentials,
            self._cache,
            _logged(field, str(uri)),
            revision=revision if uri.scheme == "hf" else None,
            ignore=ignore,
            field=field,
        )


def _of_split(paths: list[str], split: str, uri: Uri, field: str) -> list[str]:
    """Those of `paths` that are of `split`; '' stands for the one that suits the field."""
    try:
        chosen = (
            hub_splits.named(paths, split, str(uri)) if split else hub_splits.choose(paths, _SPLITS[field], str(uri))
        )
    except ValueError as error:
        raise DatasetInvalid(f"{field}: {error}") from None
    if len(chosen) < len(paths):
        log.info(f"{field}: {len(chosen)} of the {len(paths)} data files of {uri} are of this split", files=chosen[:10])
    return chosen


def base_model_id(source: str) -> str:
    """What a server calls the base model: the hub's id, else the URI."""
    uri = parse(source)
    return uri.authority if uri.scheme == "hf" else str(uri)


def _commit(folder: Path) -> str | None:
    """The commit of a snapshot in the hub's cache (…/snapshots/<commit>/…)."""
    parts = folder.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None


def _logged(field: str, uri: str, every: int = 1 << 30) -> Callable[[int], None]:
    """Log each GiB that has come."""
    seen = 0

    def on_progress(count: int) -> None:
        nonlocal seen
        before, seen = seen, seen + count
        if seen // every > before // every:
            log.info(f"{field}: {seen / every:.1f} GiB of {uri} are here")

    return on_progress
