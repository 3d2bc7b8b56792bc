"""Fetch what the spec names, into the shared cache or in place: the base model, data files, an earlier adapter."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

import structlog

from finetune_api import constants
from finetune_api.spec_data import Source
from finetune_api.uri import Uri, parse
from finetune_trainer.data import hub_splits, hub_subsets
from finetune_trainer.data.readers import is_data_file, is_unread_data
from finetune_trainer.data.row_files import DataFile
from finetune_trainer.data.tokenizer_files import drop_file_names
from finetune_trainer.errors import ConfigInvalid, DatasetInvalid
from finetune_trainer.runtime.read_ahead import read_ahead
from finetune_trainer.settings import Settings
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import BucketNotFound, StoreNotFound
from finetune_trainer.stores.fetch import fetch
from finetune_trainer.stores.mirror import WEIGHTS, mirror
from finetune_trainer.stores.tree import Tree

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
#: The splits of a hub data set that suit a field, best first.
_README_LIMIT: Final = 1 << 20
_SPLITS: Final = {"spec.dataset.eval": ("validation", "test")}


@dataclass(frozen=True)
class ModelFiles:
    """A model on this disk.

    Attributes:
        folder: Its files.
        revision: The commit on the hub, or None if it comes from elsewhere.
        weights: Its weights, as far as they are on this machine or its volumes already.
        tree: Where they may lie.
    """

    folder: Path
    revision: str | None
    weights: tuple[Path, ...] = ()
    tree: Tree | None = None

    def read_ahead(self) -> None:
        """Begin to read the weights that are here: see runtime.read_ahead."""
        if self.tree:
            read_ahead(self.weights, self.tree.open)


def fetch_model_metadata(settings: Settings, work: Path, commit: str | None = None) -> ModelFiles:
    """Fetch config.json, tokenizer and all other files of the base model except its weights.

    Args:
        settings: Name the model and where the cache is.
        work: A folder of this process.
        commit: Commit that an earlier attempt pinned; it overrides `spec.model.revision`.

    Raises:
        ConfigInvalid: There is no config.json.
        StoreError: The model cannot be fetched.
    """
    return _model(settings, work / "model", (*_NEVER, WEIGHTS), commit or settings.spec.model.revision)


def fetch_model_weights(settings: Settings, work: Path, commit: str | None) -> Path:
    """Fetch the whole base model, safetensors weights included, and return its folder.

    Raises:
        ConfigInvalid: It has no safetensors weights.
        StoreError: The model cannot be fetched.
    """
    source = settings.spec.model.source
    folder = _model(settings, work / "base", _NEVER, commit).folder
    if not any(folder.glob(WEIGHTS)):
        raise ConfigInvalid(
            f"spec.model.source: {source} has no .safetensors weights; other formats can run code and are not read"
        )
    for index in folder.glob(f"{WEIGHTS}.index.json"):
        _check_index(index, f"spec.model.source: {source}")
    return folder


def fetch_adapter(settings: Settings, work: Path) -> Path | None:
    """Fetch the adapter of `spec.lora.initFrom` to continue from; None if the spec names none.

    Raises:
        ConfigInvalid: It is no adapter, or one whose weights are not in the safetensors format.
        StoreError: The adapter cannot be fetched.
    """
    source, field = settings.spec.lora.init_from, "spec.lora.initFrom"
    if source is None:
        return None
    uri, ignore = parse(source), (*_NEVER, "checkpoints/*", "training/*")
    folder = mirror(
        _tree(settings, uri, field), _fetch(settings, uri, "model", field, ignore), work / "adapter", ignore
    )
    if not (folder / constants.ADAPTER_CONFIG_FILE).is_file():
        raise ConfigInvalid(f"{field}: {source} holds no adapter: {constants.ADAPTER_CONFIG_FILE} is missing")
    if not (folder / constants.ADAPTER_WEIGHTS_FILE).is_file():
        raise ConfigInvalid(
            f"{field}: {source} has no {constants.ADAPTER_WEIGHTS_FILE}; other formats can run code and are not read"
        )
    return folder


def fetch_data_files(settings: Settings) -> tuple[list[DataFile], list[DataFile]]:
    """Fetch the files of `dataset.train` or its sources, and of `dataset.eval` (none if it is not set).

    A URI names one file, or all below a prefix; of a data set on the hub, the files of one split.

    Raises:
        DatasetInvalid: There is no data file, or it is not clear which split is meant.
        StoreError: The files cannot be fetched.
    """
    dataset = settings.spec.dataset
    sources = [Source(uri=dataset.train)] if dataset.train else dataset.sources or []
    train = []
    for index, source in enumerate(sources):
        field = "spec.dataset.train" if dataset.train else f"spec.dataset.sources[{index}].uri"
        train += [replace(file, weight=source.weight) for file in _data_files(settings, source.uri, field)]
    return train, _data_files(settings, dataset.eval, "spec.dataset.eval") if dataset.eval else []


def base_model_id(source: str) -> str:
    """Return what a server calls the base model: the hub's id, else the URI."""
    uri = parse(source)
    return uri.authority if uri.scheme == "hf" else str(uri)


def _data_files(settings: Settings, source: str, field: str) -> list[DataFile]:
    uri = parse(source)
    try:
        uri, found, split = _fetch_data(settings, uri, field)
    except BucketNotFound:
        raise
    except StoreNotFound as error:
        raise DatasetInvalid(str(error)) from None
    tree = _tree(settings, uri, field)
    if not found.is_dir():
        return [DataFile(found, found.name, field, tree.open)]
    every = sorted(path.relative_to(found).as_posix() for path in tree.files(found))
    paths = [path for path in every if is_data_file(path)]
    if unread := [path for path in every if is_unread_data(path)]:
        raise DatasetInvalid(
            f"{field}: {uri}: {unread[0]} is compressed in a way that is not read: use .gz, .zst or .xz"
        )
    if not paths:
        raise DatasetInvalid(f"{field}: {uri} has no .jsonl, .json, .csv or .parquet file")
    if uri.scheme == "hf":
        subset = _of_subset(tree, found, every, split, f"{field}: {uri}", _SPLITS.get(field, ("train",)))
        paths = subset or _of_split(paths, split, uri, field)
    return [DataFile(found / path, path, field, tree.open) for path in paths]


def _fetch_data(settings: Settings, uri: Uri, field: str) -> tuple[Uri, Path, str]:
    """Return the URI fetched, its local path, and the split to take ('' if the URI names none).

    If the last segment of a hub URI is no path of the repository, it may be a subset or a split of the folder above it.
    """
    try:
        return uri, _fetch(settings, uri, "dataset", field), ""
    except StoreNotFound:
        above, _, name = uri.path.rstrip("/").rpartition("/")
        if not uri.is_dataset or not name or is_data_file(name):
            raise
        parent = replace(uri, path=above)
        return parent, _fetch(settings, parent, "dataset", field), name


def _model(settings: Settings, target: Path, ignore: tuple[str, ...], revision: str | None) -> ModelFiles:
    uri, field = parse(settings.spec.model.source), "spec.model.source"
    found = _fetch(settings, uri, "model", field, ignore, revision)
    tree = _tree(settings, uri, field)
    folder = mirror(tree, found, target, ignore)
    if not (folder / "config.json").is_file():
        why = "it is a file, a model is a folder" if found.is_file() else "config.json is missing"
        raise ConfigInvalid(f"{field}: {uri} holds no model: {why}")
    drop_file_names(folder)
    commit = _commit(found) or revision if uri.scheme == "hf" else None
    every = [(path, path.relative_to(found).as_posix()) for path in tree.files(found)]
    weights = [path for path, name in every if fnmatch(name, WEIGHTS) and not any(fnmatch(name, no) for no in _NEVER)]
    return ModelFiles(folder, commit, tuple(weights), tree)


def _check_index(index: Path, subject: str) -> None:
    """Raise ConfigInvalid unless the index of sharded weights names files beside it."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ConfigInvalid(f"{subject}: {index.name} is no index of weights: weight_map is missing") from None
    found = (path for path in index.parent.rglob(WEIGHTS) if path.is_file())
    there = {path.relative_to(index.parent).as_posix() for path in found}
    for name in names:
        if name not in there:
            raise ConfigInvalid(
                f"{subject}: {index.name} names {name!r:.100}, which is no safetensors file of the model"
            )


def _tree(settings: Settings, uri: Uri, field: str) -> Tree:
    return Tree.of(uri, field, settings.environment.model_cache)


def _fetch(
    settings: Settings, uri: Uri, role: str, field: str, ignore: tuple[str, ...] = (), revision: str | None = None
) -> Path:
    environment = settings.environment
    return fetch(
        uri,
        Credentials.for_role(role, secrets_dir=environment.secrets),
        environment.model_cache,
        _log_progress(field, str(uri)),
        revision=revision if uri.scheme == "hf" else None,
        ignore=ignore,
        field=field,
    )


def _of_subset(
    tree: Tree, folder: Path, paths: list[str], name: str, source: str, wanted: tuple[str, ...]
) -> list[str] | None:
    """Return the data files of the subset `name`; None if the data set's README.md declares no such subset."""
    if not name or "README.md" not in paths:
        return None
    with tree.open(folder / "README.md") as file:
        readme = file.read(_README_LIMIT).decode("utf-8", "replace")
    try:
        data = [path for path in paths if is_data_file(path)]
        return hub_subsets.files_of(readme, name, data, wanted, source)
    except ValueError as error:
        raise DatasetInvalid(str(error)) from None


def _of_split(paths: list[str], split: str, uri: Uri, field: str) -> list[str]:
    """Return the paths that belong to `split`, or with '' to the split that suits the field."""
    try:
        chosen = (
            hub_splits.named(paths, split, str(uri))
            if split
            else hub_splits.choose(paths, _SPLITS.get(field, ("train",)), str(uri))
        )
    except ValueError as error:
        raise DatasetInvalid(f"{field}: {error}") from None
    if len(chosen) < len(paths):
        used = hub_splits.split_of(chosen[0])
        log.info(f"{field}: Using {len(chosen)} of {len(paths)} files of {uri} (split {used})", files=chosen[:10])
    return chosen


def _commit(folder: Path) -> str | None:
    """Return the commit of a snapshot in the hub's cache (…/models--org--name/snapshots/<commit>/…)."""
    below = [part for part in (folder, *folder.parents) if part.parent.name == "snapshots"]
    return below[0].name if below else None


def _log_progress(field: str, uri: str, every: int = 1 << 30) -> Callable[[int], None]:
    """Return a callback for bytes downloaded that logs each GiB."""
    seen = 0

    def on_progress(count: int) -> None:
        nonlocal seen
        before, seen = seen, seen + count
        if seen // every > before // every:
            log.info(f"{field}: Downloaded {seen / every:.1f} GiB of {uri}")

    return on_progress
