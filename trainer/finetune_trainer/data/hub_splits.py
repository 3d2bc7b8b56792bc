"""Which files of a hub data set belong to which split, by the names that the `datasets` library goes by.

https://huggingface.co/docs/datasets/repository_structure
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final

_WORDS: Final = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_PATTERNS: Final = {
    split: re.compile(rf"(^|[-._ 0-9])({words})($|[-._ 0-9])", re.IGNORECASE) for split, words in _WORDS.items()
}
_SHARDED: Final = re.compile(r"(\w+)-\d{5}-of-\d{5}")


def choose(paths: Sequence[str], wanted: Sequence[str], source: str) -> list[str]:
    """Return the paths of the first split of `wanted` that exists, or all of them if no path names a split.

    Args:
        paths: Data files of the data set.
        wanted: Names of splits, best first.
        source: The data set's URI, for messages.

    Raises:
        ValueError: It is not clear which files are meant; the text says what to write instead.
    """
    splits = _by_split(paths)
    if set(splits) <= {""}:
        return list(paths)
    split = next((name for name in wanted if name in splits), None)
    if split is None:
        others = sorted(filter(None, splits))
        raise ValueError(
            f"{source} has no {' or '.join(wanted)} split; it has {', '.join(others)}: name one, as in"
            f" {source.rstrip('/')}/{others[0]}"
        )
    return _of_one_folder(splits[split], split, source)


def named(paths: Sequence[str], name: str, source: str) -> list[str]:
    """Return the paths of the split called `name` (or 'val' for validation, …); raises ValueError if there is none."""
    splits = _by_split(paths)
    split = name if name in splits else _split_in(name)
    if not split or split not in splits:
        others = ", ".join(sorted(filter(None, splits))) or "none"
        raise ValueError(f"{source} has neither a path nor a split {name!r}; its splits are: {others}")
    return _of_one_folder(splits[split], split, source)


def _of_one_folder(folders: dict[str, list[str]], split: str, source: str) -> list[str]:
    """Return the only folder's paths. Several folders are subsets, such as languages: the user must choose."""
    if len(folders) > 1:
        names = sorted(folders)
        raise ValueError(
            f"{source} has a {split} split in several folders ({', '.join(name or '/' for name in names)}): name one,"
            f" as in {source.rstrip('/')}/{names[-1]}"
        )
    return next(iter(folders.values()))


def _by_split(paths: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return split ('' where the path names none) -> folder above it -> paths."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        split, folder = _split_and_folder(path)
        found[split][folder].append(path)
    return found


def split_of(path: str) -> str:
    """Return the split that `path` names, or '' if it names none."""
    return _split_and_folder(path)[0]


def _split_and_folder(path: str) -> tuple[str, str]:
    """Return the split that `path` names, and the folder above that name. Folders count before the file's own name."""
    *folders, file = PurePosixPath(path).parts
    for depth, folder in enumerate(folders):
        if split := _split_in(folder):
            return split, "/".join(folders[:depth])
    stem = file.rpartition(".")[0] or file
    split, sharded = _split_in(stem), _SHARDED.match(stem)
    if split and sharded:  # train_sft-00000-of-00003.parquet is of a split of its own, train_sft
        whole = sharded.group(1)
        split = split if whole.lower() in _WORDS[split].split("|") else whole
    return split, "/".join(folders)


def _split_in(name: str) -> str:
    return next((split for split, pattern in _PATTERNS.items() if pattern.search(name)), "")
