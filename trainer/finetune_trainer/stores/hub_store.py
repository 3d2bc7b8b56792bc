"""A model repository of the hub as a store to push an adapter to, with huggingface_hub's own client.

Files are kept until one of them is asked for, and then committed together; manifest.json is a commit of its own.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, hf_hub_url
from huggingface_hub import errors as hub
from huggingface_hub.utils._http import hf_raise_for_status
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from finetune_api.uri import Uri
from finetune_trainer.errors import TrainerError
from finetune_trainer.stores import endpoints, patience
from finetune_trainer.stores.base import Entry, OnProgress
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.digest import CHUNK_BYTES, Digest
from finetune_trainer.stores.errors import (
    AlreadyExists,
    StoreAccessDenied,
    StoreCorrupted,
    StoreMisconfigured,
    StoreNotFound,
    StoreUnavailable,
)
from finetune_trainer.stores.hub import ATTEMPTS, explain, forbid_detours, shown_endpoint
from finetune_trainer.stores.hub_answers import ANSWER_SECONDS
from finetune_trainer.stores.streamed import StreamedStore

_BRANCH: Final = "main"


class HubStore(StreamedStore):
    """The branch main of one model repository."""

    def __init__(self, root: Uri, credentials: Credentials, field: str) -> None:
        """Open hf://owner/name. Makes no request; raises StoreMisconfigured.

        Args:
            root: The repository.
            credentials: HF_TOKEN, and HF_ENDPOINT if it is another hub than huggingface.co.
            field: The manifest's field, for messages.
        """
        super().__init__(root, field)
        endpoint = shown_endpoint(credentials, field)
        if refusal := endpoints.refusal(endpoint):
            raise StoreMisconfigured(f"{field}: {root}: HF_ENDPOINT {refusal}")
        forbid_detours()
        self._shown = endpoint
        self._where, self._credentials = f"{field}: {root} at {endpoint}", credentials
        self._endpoint = credentials.get("HF_ENDPOINT") or constants.ENDPOINT
        self._api = HfApi(endpoint=self._endpoint, token=credentials.get("HF_TOKEN") or False)
        self._name = root.authority
        self._pending: dict[str, Path | bytes] = {}
        self._retrying = Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.5, max=5),
            retry=retry_if_exception(lambda e: isinstance(e, StoreUnavailable) and not isinstance(e, StoreCorrupted)),
            reraise=True,
        )

    def check_writable(self, path: str) -> None:
        """Make the repository, a private one, if there is none, and ask the hub whether this token may write to it."""
        if not self._credentials.get("HF_TOKEN"):
            raise StoreAccessDenied(
                f"{self._where}: to push needs an HF_TOKEN that may write ({self._credentials.where})"
            )
        self._policy(self._ask, self._api.create_repo, self._name, private=True, exist_ok=True)
        self._policy(self._ask, self._api.auth_check, self._name, write=True)

    def entries(self) -> list[Entry]:
        self._commit("Adapter, not verified yet")
        return self._committed()

    def _committed(self) -> list[Entry]:
        try:
            # Not list_repo_tree, which the library retries by itself, on top of our retries.
            found = self._policy(self._ask, self._api.model_info, self._name, revision=_BRANCH, files_metadata=True)
        except StoreNotFound:
            return []
        return [Entry(each.rfilename, each.size or 0, each.blob_id or "") for each in found.siblings or ()]

    def entry(self, path: str) -> Entry:
        found = self.entries() if path in self._pending else self._committed()
        for each in found:
            if each.path == path:
                return each
        raise StoreNotFound(f"{self.field}: {self.uri_of(path)} does not exist")

    def exists(self, path: str) -> bool:
        return path in self._pending or any(each.path == path for each in self._committed())

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        size = self.entry(path).size  # commits it if it is pending
        if size <= start:
            return
        url = hf_hub_url(self._name, path, revision=_BRANCH, endpoint=self._endpoint)
        headers = self._api._build_hf_headers() | {"Range": f"bytes={start}-{size - 1}", "Accept-Encoding": "identity"}
        left = size - start
        with self._explained(), get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            skip = start if response.status_code == 200 else 0
            for chunk in response.iter_bytes(CHUNK_BYTES):
                kept = chunk[skip:][:left]
                skip, left = max(0, skip - len(chunk)), left - len(kept)
                yield kept
                if not left:
                    return
        raise StoreUnavailable(f"{self._where}: the connection broke off before the end of {path}")

    def upload(
        self, local: Path, path: str, on_progress: OnProgress | None = None, digest: Digest | None = None
    ) -> None:
        self._pending[path] = local
        if on_progress:
            on_progress(local.stat().st_size)

    def write_bytes(self, path: str, data: bytes, if_none_match: bool = False) -> None:
        if if_none_match and self.exists(path) and self.read_bytes(path) != data:
            raise AlreadyExists(f"{self.field}: {self.root} is taken by another adapter")
        self._commit("Adapter, not verified yet")
        self._pending[path] = data
        self._commit("Adapter, loaded back and verified")

    def delete(self, path: str) -> None:
        if self._pending.pop(path, None) is None and self.exists(path):
            operations = [CommitOperationDelete(path)]
            self._policy(self._ask, self._api.create_commit, self._name, operations, commit_message=f"Delete {path}")

    def _commit(self, message: str) -> None:
        """Commit what is pending, all of it or nothing."""
        if not self._pending:
            return

        def once() -> None:  # the library changes its operations: a second try needs new ones
            with ExitStack() as files:  # open files it sends itself, others through Xet's client
                operations = [
                    CommitOperationAdd(path, files.enter_context(_opened(content)))
                    for path, content in self._pending.items()
                ]
                self._ask(self._api.create_commit, self._name, operations, commit_message=message)

        self._policy(once)
        self._pending = {}

    def _policy(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with patience.waiting_for(f"the hub at {self._shown}", ATTEMPTS * ANSWER_SECONDS):
            return self._retrying(function, *args, **options)

    def _ask(self, function: Any, *args: Any, **options: Any) -> Any:
        with self._explained():
            return function(*args, **options)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except TrainerError:
            raise
        except hub.EntryNotFoundError as error:
            raise StoreNotFound(f"{self._where} has no such file") from error
        except Exception as error:  # the library takes an answer for what it should be, so anything can go wrong
            raise explain(error, self._where, self._credentials, None) from error


def _opened(content: Path | bytes) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
