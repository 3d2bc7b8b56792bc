"""Manifest files as the user gives them: several documents in one, stdin, other kinds in between."""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api import constants
from finetune_cli.errors import CliError

if TYPE_CHECKING:
    from finetune_api.manifest import Document, ManifestError

STDIN = "-"
STDIN_NAME = "<stdin>"
#: How files of rows are called, which are taken for manifests now and then.
_ROWS = (".jsonl", ".ndjson", ".csv", ".parquet")


@dataclass(frozen=True)
class Source:
    """A manifest's text, the name it goes by in messages, and the folder its relative paths start from."""

    name: str
    text: str
    base: Path


def read(name: str) -> Source:
    """Read a file, or stdin for "-". Raises CliError."""
    from finetune_api.manifest import ManifestError, decoded

    if name.endswith(_ROWS):
        raise CliError(
            f"{name}: holds rows, and is no manifest", hint=f"finetune init --data {name} writes one for them"
        )
    try:
        if name == STDIN:
            return Source(STDIN_NAME, decoded(sys.stdin.buffer.read(), STDIN_NAME), Path.cwd())
        path = Path(name)
        return Source(name, decoded(path.read_bytes(), name), path.resolve().parent)
    except ManifestError as error:
        raise refused(error) from None
    except FileNotFoundError:
        raise CliError(f"{name}: no such file", hint=f"finetune init {name} writes a manifest") from None
    except IsADirectoryError:
        raise CliError(
            f"{name}: is a folder, not a manifest",
            hint=f"name its files, or for a kustomization: kubectl kustomize {name} | finetune validate -",
        ) from None
    except OSError as error:
        raise CliError(f"{name}: cannot be read: {error.strerror}") from None


def job_name(value: str, *, or_path: bool = False) -> str:
    """Return a name that a FineTuneJob can have; anything else would ask the cluster for something else.

    Args:
        value: What was given.
        or_path: Whether a path could be given in its place.
    """
    if re.fullmatch(constants.NAME_PATTERN, value):
        return value
    hint = ""
    if value.endswith((".yaml", ".yml")):
        hint = "this is a manifest's file: give the name that its metadata.name says"
    elif or_path and Path(value).exists():
        hint = f"a path is written with a slash: ./{value}"
    kinds = " or a ".join(constants.KINDS)
    raise CliError(f"{value!r} is no name of a {kinds}: it {constants.NAME_RULE}", hint=hint)


def refused(error: ManifestError) -> CliError:
    """Return a manifest's problems, one a line, as the end of a command."""
    return CliError(str(error))


def foreign_kind(document: Document) -> str | None:
    """Return the kind of a document that plainly is something else (a Secret, say); None for ours and broken ones."""
    if document.is_job or document.is_sweep or not isinstance(document.data, dict):
        return None
    kind, version = document.data.get("kind"), document.data.get("apiVersion")
    if not isinstance(kind, str) or str(version).startswith(f"{constants.GROUP}/") or _is_near_ours(kind):
        return None
    return kind


def _is_near_ours(kind: str) -> bool:
    """Return whether a kind is ours, misspelled: it must not pass for somebody else's."""
    return bool(difflib.get_close_matches(kind.lower(), [each.lower() for each in constants.KINDS], 1, 0.8))


def _is_kustomization(document: Document) -> bool:
    """Return whether a document is one: its kind may be left out."""
    data = document.data
    if not isinstance(data, dict):
        return False
    return data.get("kind") == "Kustomization" or ("kind" not in data and "resources" in data and "spec" not in data)


def documents(source: Source) -> list[Document]:
    """Return the documents of a manifest. Raises ManifestError for text that is not YAML, CliError if there is none."""
    from finetune_api.manifest import parse

    found = parse(source.text, source.name)
    for document in found:
        if _is_kustomization(document):
            folder = Path(source.name).parent
            raise CliError(
                f"{source.name}: is a kustomization, which kubectl turns into manifests",
                hint=f"kubectl kustomize {folder} | finetune validate -",
            )
    if not found:
        raise CliError(
            f"{source.name}: is empty: a manifest needs apiVersion: {constants.API_VERSION} and kind: {constants.KIND}"
        )
    return found


def the_job(name: str, *, or_sweep: bool = False) -> tuple[Source, Document]:
    """Return the one FineTuneJob of a file, other kinds aside. Raises CliError when there is none or more than one.

    Args:
        name: The file.
        or_sweep: Whether it may be a FineTuneSweep.
    """
    from finetune_api.manifest import ManifestError

    source = read(name)
    try:
        found = documents(source)
        ours = [document for document in found if foreign_kind(document) is None]
    except ManifestError as error:
        raise refused(error) from None
    if len(ours) != 1:
        count = f"no {constants.KIND}" if not ours else f"{len(ours)} {constants.KIND}s"
        others = ", ".join(dict.fromkeys(foreign_kind(each) or "" for each in found))
        of = f" (but {others})" if not ours else ""
        raise CliError(f"{source.name}: holds {count}{of}, this command takes one")
    if ours[0].is_sweep and not or_sweep:
        raise CliError(
            f"{source.name}: holds a {constants.SWEEP_KIND}, this command takes one {constants.KIND}",
            hint="validate, plan, run, submit, list and status take sweeps",
        )
    return source, ours[0]
