"""Subsets of a hub data set, as the front matter of its README.md declares them.

https://huggingface.co/docs/hub/datasets-manual-configuration
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from finetune_api.yaml_documents import ManifestError, parse


def files_of(readme: str, subset: str, paths: Sequence[str], wanted: Sequence[str], source: str) -> list[str] | None:
    """Return the paths of the first split of `wanted` that a subset has; None if README.md declares no such subset.

    Args:
        readme: The text of README.md.
        subset: Its config_name.
        paths: Data files of the data set.
        wanted: Names of splits, best first.
        source: The data set's URI, for messages.

    Raises:
        ValueError: The subset has none of the splits, or none of its files is there.
    """
    declared = next((each for each in _configs(readme) if each.get("config_name") == subset), None)
    if declared is None:
        return None
    splits = _splits(declared.get("data_files"))
    split = next((name for name in wanted if name in splits), None)
    if split is None:
        raise ValueError(
            f"{source}: its subset {subset} has no {' or '.join(wanted)} split; it has {', '.join(splits) or 'none'}"
        )
    found = [path for path in paths if any(fnmatch(path, pattern) for pattern in splits[split])]
    if not found:
        named = splits[split][0] if splits[split] else "none"
        raise ValueError(f"{source}: its README.md names files of {subset} that are not there: {named}")
    return found


def _configs(readme: str) -> list[dict[str, Any]]:
    parts = readme.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return []
    try:
        documents = parse(parts[1], "README.md")
    except ManifestError:
        return []
    front = documents[0].data if documents else None
    configs = front.get("configs") if isinstance(front, dict) else None
    return [each for each in configs if isinstance(each, dict)] if isinstance(configs, list) else []


def _splits(files: Any) -> dict[str, list[str]]:
    """Return split -> patterns, of data_files in its forms: a pattern, patterns, or objects with split and path."""
    if isinstance(files, str):
        return {"train": [files]}
    found: dict[str, list[str]] = {}
    for each in files if isinstance(files, list) else []:
        split, path = (each.get("split"), each.get("path")) if isinstance(each, dict) else ("train", each)
        patterns = path if isinstance(path, list) else [path]
        found.setdefault(str(split), []).extend(pattern for pattern in patterns if isinstance(pattern, str))
    return found
