"""Copy a model's small files out of the reach of others before libraries, which open files by name, read them."""

import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

import structlog

from finetune_trainer.stores.errors import on_local_disk
from finetune_trainer.stores.tree import Tree

log = structlog.get_logger(__name__)
WEIGHTS: Final = "*.safetensors"
#: No configuration, tokenizer or template is larger; weights are never copied.
_MAX_BYTES: Final = 256 << 20


def mirror(tree: Tree, folder: Path, target: Path, ignore: Sequence[str] = ()) -> Path:
    """Make `target` a folder with the files of `folder` that do not match `ignore`; hidden ones are left out.

    Whoever can write to a claim can replace a file by a link at any time: what a library reads from `target`, and may
    publish, cannot change any more. Weights are links: they are large, and nothing of them is published as it is.

    Raises:
        LeadsOutside: A file does not lie where `tree` says.
        StoreUnavailable: `target` cannot be written.
    """
    with on_local_disk(tree.subject, target):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in tree.files(folder):
            name = path.relative_to(folder).as_posix()
            if any(fnmatch(name, pattern) for pattern in ignore):
                continue
            local = target / name
            local.parent.mkdir(parents=True, exist_ok=True)
            if fnmatch(name, WEIGHTS):
                local.symlink_to(path.resolve())
            else:
                _copy(tree, path, local)
    return target


def _copy(tree: Tree, path: Path, local: Path) -> None:
    with tree.open(path) as source:
        data = source.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        log.warning(f"{tree.subject}: {path.name} is larger than {_MAX_BYTES >> 20} MiB and no weights: left out")
        return
    local.write_bytes(data)
