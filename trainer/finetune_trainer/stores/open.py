"""Open what a URI names: one entry per scheme. To add one, see docs/extending/store.md."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from finetune_api import constants
from finetune_api.uri import Uri
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.tree import Tree

#: Opens the store below a URI: (URI, credentials, the manifest's field for messages, environment).
Opener = Callable[[Uri, Credentials, str, Mapping[str, str]], Store]

#: The manifest's field of a role's URI, if the caller does not say.
_FIELD_OF_ROLE: Final = {"model": "model.source", "dataset": "dataset.train", "output": "output.uri"}


def open_store(
    uri: Uri, credentials: Credentials, *, field: str | None = None, env: Mapping[str, str] | None = None
) -> Store:
    """Open the store below `uri`. Nothing is contacted yet.

    Args:
        uri: The store's root, of one of SCHEMES.
        credentials: Of the role that the store is opened for.
        field: The manifest's field to name in messages; default: the role's.
        env: Says where claims are mounted; default: the process's environment.
    """
    field = field or _FIELD_OF_ROLE.get(credentials.role, f"{credentials.role} URI")
    return SCHEMES[uri.scheme](uri, credentials, field, os.environ if env is None else env)


def _open_s3(uri: Uri, credentials: Credentials, field: str, env: Mapping[str, str]) -> Store:
    from finetune_trainer.stores.s3.store import S3Store

    return S3Store(uri, credentials, field)


def _open_folder(uri: Uri, credentials: Credentials, field: str, env: Mapping[str, str]) -> Store:
    from finetune_trainer.stores.folder import FolderStore

    return FolderStore(uri, Path(uri.path), Tree.of(uri, field, env=env), field)


def _open_claim(uri: Uri, credentials: Credentials, field: str, env: Mapping[str, str]) -> Store:
    from finetune_trainer.stores.folder import FolderStore

    mount = Path(env.get(constants.ENV_PVC_ROOT) or constants.PVC_ROOT) / uri.authority
    return FolderStore(uri, mount / uri.path, Tree.of(uri, field, env=env), field, mount=mount)


def _open_registry(uri: Uri, credentials: Credentials, field: str, env: Mapping[str, str]) -> Store:
    from finetune_trainer.stores.oci.store import OciStore

    return OciStore(uri, credentials, field)


def _open_repository(uri: Uri, credentials: Credentials, field: str, env: Mapping[str, str]) -> Store:
    from finetune_trainer.stores.hub_store import HubStore

    return HubStore(uri, credentials, field)


#: Each scheme's store. Its module is imported when the scheme is first used: boto3 alone takes half a second.
#: Adapters are pushed to oci:// and hf://. What is read from hf://, fetch.py hands to the hub's own client and cache.
SCHEMES: Final[dict[str, Opener]] = {
    "s3": _open_s3,
    "pvc": _open_claim,
    "file": _open_folder,
    "oci": _open_registry,
    "hf": _open_repository,
}
