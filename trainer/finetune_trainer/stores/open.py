"""Open the store that a URI names."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from finetune_api import constants
from finetune_api.uri import Uri
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials

#: The manifest's field a role's URI stands in, when the caller does not say.
_FIELD_OF_ROLE: Final = {"model": "model.source", "dataset": "dataset.train", "output": "output.uri"}


def open_store(
    uri: Uri, credentials: Credentials, *, field: str | None = None, env: Mapping[str, str] | None = None
) -> Store:
    """The store below `uri` (s3, pvc or file). Nothing is contacted yet.

    `field` is the manifest's field to blame in messages; `env` (default: the process's) says where claims are mounted.
    """
    field = field or _FIELD_OF_ROLE.get(credentials.role, f"{credentials.role} URI")
    if uri.scheme == "s3":
        from finetune_trainer.stores.s3.store import S3Store

        return S3Store(uri, credentials, field)
    from finetune_trainer.stores.folder import FolderStore, local_path

    env = os.environ if env is None else env
    pvc_root = Path(env.get(constants.ENV_PVC_ROOT) or constants.PVC_ROOT)
    return FolderStore(uri, local_path(uri, pvc_root), field, mount=pvc_root / uri.authority if uri.authority else None)
