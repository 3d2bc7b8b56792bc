"""A server that speaks S3 and lies: what it says costs neither memory nor time, and is told in a sentence."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from finetune_api.uri import parse
from finetune_trainer.checkpoints import remote
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import StoreMisconfigured, StoreUnavailable
from finetune_trainer.stores.open import open_store
from finetune_trainer.stores.s3 import answers as s3_answers
from finetune_trainer.stores.s3 import retry
from finetune_trainer.stores.s3 import store as s3_store

#: Status, headers and body of an answer, by method.
Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Store]]:
    """Open a store whose server gives these answers; COUNT in a body is another number in each."""
    answers: dict[str, Answer] = {}
    count = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = answers[self.command]
            body = body.replace(b"COUNT", b"%d" % next(count))
            self.send_response_only(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                if self.command == "GET":
                    self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr(retry, "MAX_TRIES", 2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "FINETUNE_STORE_PATIENCE": "0"}

    def store(get: Answer, head: Answer = (200, {}, b"{}")) -> Store:
        answers.update(GET=get, HEAD=head)
        credentials = Credentials("dataset", {"AWS_ENDPOINT_URL": endpoint} | keys)
        return open_store(parse("s3://bucket/data"), credentials, field="dataset.train")

    yield store
    server.shutdown()
    server.server_close()


def test_a_size_that_no_disk_holds_is_not_believed(lying: Callable[..., Store], tmp_path: Path) -> None:
    """Ten terabytes are a million ranges: gigabytes of memory before the first byte arrives."""
    store = lying((200, {}, b"{}"), (200, {"Content-Length": str(10**13), "ETag": '"e"'}, b""))
    with pytest.raises(StoreUnavailable, match="No space left on device"):
        store.download("a.jsonl", tmp_path / "a.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", ["", "-1", "x"])
def test_an_object_without_a_length_is_explained(lying: Callable[..., Store], length: str, tmp_path: Path) -> None:
    headers = {"Content-Length": length, "ETag": '"e"', "Connection": "close"}
    store = lying((200, {}, b"{}"), (200, headers, b""))
    for ask in (lambda: store.download("a.jsonl", tmp_path / "a.jsonl"), lambda: store.size("a.jsonl")):
        with pytest.raises(StoreUnavailable, match="its answers cannot be read"):
            ask()


@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_that_leads_to_itself_is_explained(lying: Callable[..., Store], status: int) -> None:
    elsewhere = {"Location": "http://169.254.169.254/"}
    store = lying((status, elsewhere, b""), (status, elsewhere, b""))
    with pytest.raises(StoreUnavailable, match=r"its answers cannot be read|is in another region"):
        store.list()


def test_a_code_of_the_servers_own_is_cut(lying: Callable[..., Store]) -> None:
    store = lying((400, {}, b"<Error><Code>" + b"A" * 100_000 + b"</Code></Error>"))
    with pytest.raises(StoreUnavailable, match=r"keeps answering A{64} \(HTTP 400\)"):
        store.list()


@pytest.mark.parametrize("step", ["9" * 5000, "\u0665" * 8])
def test_a_checkpoint_of_no_step_is_none(lying: Callable[..., Store], step: str) -> None:
    key = f"data/step-{step}/manifest.json"
    page = f"<ListBucketResult><Contents><Key>{key}</Key><Size>2</Size></Contents></ListBucketResult>"
    store = lying((200, {}, page.encode()))
    assert remote.newest(store) is None
    remote.delete_all(store)


@pytest.mark.parametrize("objects", [0, 2])
def test_a_listing_without_an_end_is_ended(
    lying: Callable[..., Store], objects: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "MAX_OBJECTS", 5)
    monkeypatch.setattr(s3_store, "MAX_PAGES", 9)
    item = "<Contents><Key>data/COUNT</Key><Size>2</Size></Contents>" * objects
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>COUNT</NextContinuationToken>"
    store = lying((200, {}, f"<ListBucketResult>{more}{item}</ListBucketResult>".encode()))
    with pytest.raises(StoreMisconfigured, match=r"dataset.train: s3://bucket/data\S* .*lists more than 5 objects"):
        store.list()


@pytest.mark.parametrize(
    ("status", "ask"), [(200, "list"), (400, "list"), (503, "list"), (400, "stream"), (503, "stream")]
)
def test_an_answer_without_an_end_is_not_read_whole(
    lying: Callable[..., Store], status: int, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_answers, "MAX_BYTES", 1 << 20)
    store = lying((status, {}, b"<ListBucketResult>" + b" " * (2 << 20) + b"</ListBucketResult>"))
    with pytest.raises(StoreUnavailable, match="its answer has more than 1 MiB"):
        list(store.list() if ask == "list" else store.stream("a"))
