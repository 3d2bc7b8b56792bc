"""Pages while a run lasts, and a last chance to read them."""

import threading
import time
from urllib.request import urlopen

import pytest

from finetune_trainer.reporting import http


def _read(address: str | None, path: str = "/metrics") -> str:
    with urlopen(f"http://{address}{path}") as answer:
        return str(answer.read().decode())


def test_who_has_asked_may_hear_the_last_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LAST_SCRAPE_SECONDS", 30)
    numbers, heard = ["first"], []
    pages = {"/metrics": ("text/plain", lambda: numbers[-1].encode())}

    def ask_again(address: str | None) -> None:
        time.sleep(0.2)
        heard.append(_read(address))

    with http.serve("127.0.0.1:0", pages) as address:
        assert _read(address) == "first"
        numbers.append("last")
        asking = threading.Thread(target=ask_again, args=(address,))
        asking.start()
    asking.join()
    assert heard == ["last"]


def test_an_answer_under_way_as_the_run_ends_is_not_taken_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LAST_SCRAPE_SECONDS", 30)
    begun, ended = threading.Event(), threading.Event()

    def slowly() -> bytes:
        first = not begun.is_set()
        begun.set()
        ended.wait(30)
        return b"first" if first else b"last"

    heard: list[str] = []

    def ask(address: str | None) -> None:
        heard.append(_read(address))
        heard.append(_read(address))

    with http.serve("127.0.0.1:0", {"/metrics": ("text/plain", slowly)}) as address:
        asking = threading.Thread(target=ask, args=(address,))
        asking.start()
        assert begun.wait(30)
        threading.Timer(0.2, ended.set).start()
    asking.join()
    assert heard == ["first", "last"]


def test_nobody_is_waited_for_who_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LAST_SCRAPE_SECONDS", 3600)
    with http.serve("127.0.0.1:0", {}) as address:
        assert address
