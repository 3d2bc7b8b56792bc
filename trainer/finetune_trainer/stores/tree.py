"""What a URI may reach: files that lie below one folder, however symbolic links are laid.

Links are followed as long as they stay below that folder: Kubernetes' projected volumes and the hub's cache use them.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from finetune_api import constants
from finetune_api.uri import Uri
from finetune_trainer.stores.errors import LeadsOutside

#: Where a machine keeps what no job may publish; the folder of the job's Secrets counts too.
_PRIVATE: Final = ("/etc", "/proc", "/run/secrets", "/sys", "/var/run/secrets")
_OPENED: Final = Path("/proc/self/fd")


@dataclass(frozen=True)
class Tree:
    """The files below `root` that may be read and written.

    Attributes:
        root: A folder, without links.
        subject: The beginning of a message: the manifest's field and the URI.
        private: Folders, without links, in which nothing is read even if they lie below `root`.
    """

    root: Path
    subject: str
    private: tuple[Path, ...] = ()

    @classmethod
    def of(cls, uri: Uri, field: str, cache: Path | None = None, env: Mapping[str, str] = os.environ) -> "Tree":
        """Return what `uri` may reach: a claim's mount, a folder of this machine, or what was downloaded to `cache`."""
        secrets = env.get(constants.ENV_SECRETS_DIR) or constants.SECRETS_DIR
        private = tuple(_real(Path(folder)) for folder in (*_PRIVATE, secrets))
        return cls(_real(_root(uri, cache, env)), f"{field}: {uri}", private)

    def check(self, path: Path) -> None:
        """Raise LeadsOutside if `path`, which need not exist, does not resolve below the root."""
        self._check_resolved(_real(path), path)

    def open(self, path: Path) -> BinaryIO:
        """Open a file to read it. What was opened is checked, not what `path` was a moment ago.

        Raises:
            LeadsOutside: It does not lie below the root.
            OSError: It cannot be opened, or is no file.
        """
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not keep us waiting
        try:
            opened = _OPENED / str(handle)
            self._check_resolved(opened.readlink() if opened.exists() else _real(path), path)
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise IsADirectoryError(f"{path.name} is no file")
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise

    def files(self, folder: Path) -> Iterator[Path]:
        """Yield the files below `folder`, each below the root, sorted; nothing hidden, and no link that leads nowhere.

        Raises:
            LeadsOutside: A file or folder does not lie below the root.
        """
        seen: set[Path] = set()
        for parent, folders, names in os.walk(folder, followlinks=True):
            real = _real(Path(parent))
            self._check_resolved(real, Path(parent))
            if real in seen:  # a link that leads to a folder above it
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in sorted(Path(parent, name) for name in names if not name.startswith(".")):
                self.check(path)
                if path.is_file():
                    yield path

    def _check_resolved(self, real: Path, path: Path) -> None:
        inside = real.is_relative_to(self.root)
        if not inside or any(real.is_relative_to(folder) for folder in self.private):
            where = f"leads out of {self.root}" if not inside else "leads to a folder that is private"
            raise LeadsOutside(
                f"{self.subject}: {path} {where}, through a symbolic link: only files below the folder or claim"
                " itself are read or written: put a copy there instead of the link"
            )


def _real(path: Path) -> Path:
    """Return `path` without links. Path.resolve raises for a loop of links before Python 3.13."""
    return Path(os.path.realpath(path))


def _root(uri: Uri, cache: Path | None, env: Mapping[str, str]) -> Path:
    if uri.scheme == "pvc":
        return Path(env.get(constants.ENV_PVC_ROOT) or constants.PVC_ROOT) / uri.authority
    if uri.scheme != "file":
        return cache if cache is not None else Path()
    # Whoever names a link names what it leads to: what is private stays so.
    folder = _real(Path(uri.path))
    if not folder.is_dir():
        folder = folder.parent
    # A snapshot of the hub's cache (models--org--name/snapshots/<commit>) is links to blobs beside it.
    is_snapshot = folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()
    return folder.parent.parent if is_snapshot else folder
