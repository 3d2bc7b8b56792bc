"""No secret value reaches a log, a status or an event, in whatever form a library quotes it."""

import base64
import json
import logging
import threading
from pathlib import Path
from urllib.parse import quote, quote_plus

import httpx2
import pytest

from finetune_api import constants
from finetune_trainer import redact
from finetune_trainer.errors import failure_of
from finetune_trainer.redact import redacted
from finetune_trainer.reporting import logs
from finetune_trainer.stores.credentials import Credentials

SECRET = 'p/ss "wörd+&\\x'


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redact, "_forms", set())


def _basic(user: str) -> str:
    return base64.b64encode(f"{user}:{SECRET}".encode()).decode()


QUOTED = [
    SECRET,
    repr(SECRET),
    repr(SECRET.encode()),
    str([SECRET.encode()]),
    json.dumps(SECRET),
    json.dumps({"headers": repr(SECRET.encode())}),
    json.dumps({"text": SECRET}, ensure_ascii=False),
    quote(SECRET),
    quote(SECRET, safe=""),
    quote_plus(SECRET),
    *(_basic("u" * length) for length in range(1, 5)),
    base64.urlsafe_b64encode(SECRET.encode()).decode(),
]


@pytest.mark.parametrize("text", QUOTED)
def test_a_secret_is_hidden_in_every_form(text: str) -> None:
    assert redacted(f"before {text} after") == f"before {text} after", "unknown so far"
    redact.remember(SECRET)
    said = redacted(f"before {text} after")
    assert said.startswith("before ") and said.endswith(" after") and "…" in said
    for part in ("wörd", "w\\xf6rd", "w\\u00f6rd", "w%C3%B6rd", base64.b64encode(SECRET.encode()).decode()[4:-4]):
        assert part not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Illegal header value b'Bearer hf_abc123def456\\n'", "Illegal header value b'Bearer …'"),
        ("Authorization: Basic dXNlcjpwYXNzd29yZA==, x", "Authorization: Basic …, x"),
        ('{"x": "AWS4-HMAC-SHA256 Credential=AKIA/1, Signature=ab"}', '{"x": "AWS4-HMAC-SHA256 …"}'),
        ("GET /blob?se=2026&sig=ab%2Bc%3D HTTP/1.1", "GET /blob?se=2026&sig=… HTTP/1.1"),  # Azure's
        ("/x?X-Amz-Signature=abc&X-Amz-Credential=AKIA%2F1&b=2", "/x?X-Amz-Signature=…&X-Amz-Credential=…&b=2"),
        ("http://me:word@host/x", "http://host/x"),
        ("Basic authentication failed: no bearer token", "Basic authentication failed: no bearer token"),
    ],
)
def test_a_header_is_hidden_whoever_wrote_it_and_a_sentence_is_not(text: str, said: str) -> None:
    assert redacted(text) == said


def test_an_unforeseen_error_quotes_no_value_of_a_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "HF_TOKEN").write_text("hf_firstpart1\nsecondpart2")
    (tmp_path / "model" / "SOME_OTHER").write_text("canary-value")
    Credentials.for_role("model", {}, tmp_path)
    logs.configure()
    try:
        for text in ("hf_firstpart1\nsecondpart2", "canary-value"):
            try:
                httpx2.Client().get("http://127.0.0.1:9", headers={"Authorization": f"Bearer {text}"})
            except Exception as error:
                failure = failure_of(error)
                assert "part" not in failure.message and "canary" not in failure.message
                logging.getLogger("lib").error("lost %s", text, exc_info=error)
            thread = threading.Thread(target=int, args=(text,), name="lost")
            thread.start()
            thread.join()
    finally:
        logging.getLogger().handlers = []
    shown = capsys.readouterr()
    assert "ValueError" in shown.err and "A thread (lost) failed" in shown.err
    assert "part" not in shown.err and "canary" not in shown.err


def test_what_says_where_a_store_is_stays_readable(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    for key, value in {"AWS_ENDPOINT_URL": "http://store:9000", "AWS_REGION": "eu-north-1"}.items():
        (tmp_path / "output" / key).write_text(value)
    Credentials.for_role("output", {constants.ENV_SECRETS_DIR: str(tmp_path)})
    assert redacted("http://store:9000 in eu-north-1") == "http://store:9000 in eu-north-1"
