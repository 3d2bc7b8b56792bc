"""Weights are read into the page cache while a run does other things; nothing depends on it."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.runtime import read_ahead as module
from finetune_trainer.runtime.read_ahead import read_ahead


def plain(path: Path) -> Any:
    return path.open("rb")


def finish(readers: list[threading.Thread]) -> None:
    for each in readers:
        each.join(10)
    assert not any(each.is_alive() for each in readers)


@pytest.mark.parametrize("cached", [False, True])
def test_every_byte_is_read_once_unless_the_kernel_has_it(
    cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1000)
    monkeypatch.setattr(module, "_is_cached", lambda handle, at: cached)
    read, whole = [], os.preadv

    def counting(handle: int, buffers: Any, at: int, *flags: int) -> int:
        found = whole(handle, buffers, at, *flags)
        read.append(found)
        return found

    monkeypatch.setattr(os, "preadv", counting)
    files = [tmp_path / f"{number}.safetensors" for number in range(6)]
    for number, file in enumerate(files):
        file.write_bytes(b"x" * (1500 * number))
    finish(read_ahead(files, plain))
    assert sum(read) == (0 if cached else 1500 * 15)


def test_what_was_just_written_is_cached_or_the_kernel_does_not_tell(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10)
    with (tmp_path / "file").open("rb") as file:
        assert module._is_cached(file.fileno(), 0) in (True, False)
        assert module._is_cached(file.fileno(), 10) is False, "nothing is there"
    assert module._is_cached(-1, 0) is False


def test_no_more_is_read_than_memory_holds_and_the_first_files_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file in files:
        file.write_bytes(b"x" * 100)
    opened: list[Path] = []
    monkeypatch.setattr(module, "room", lambda: 250)
    finish(read_ahead(files, lambda path: opened.append(path) or plain(path)))
    assert sorted(opened) == files[:2]
    monkeypatch.setattr(module, "room", lambda: 99)
    assert read_ahead(files, plain) == []
    assert read_ahead([], plain) == []


def test_threads_that_the_pod_does_not_allow_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, start, started = [tmp_path / name for name in "abc"], threading.Thread.start, []
    for file in files:
        file.write_bytes(b"x")

    def limited(thread: threading.Thread) -> None:
        if len(started) == most:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    monkeypatch.setattr(module, "room", lambda: 100)
    for most in (0, 1):
        opened: list[Path] = []
        readers = read_ahead(files, lambda path, opened=opened: opened.append(path) or plain(path))
        finish(readers)
        assert (len(readers), len(opened)) == (most, 3 * most)


def test_room_is_a_part_of_what_the_container_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("_MEMINFO", "MemTotal: 9 kB\nMemAvailable:   1000 kB\n"), ("_LIMIT", "400000\n")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(module, name, tmp_path / name)
    assert module.room() == 200_000
    (tmp_path / "_LIMIT").write_text("max\n")
    assert module.room() == 512_000
    (tmp_path / "_MEMINFO").unlink()
    assert module.room() == 0, "what is not known is not taken"


def test_files_that_cannot_be_read_stop_nothing(tmp_path: Path) -> None:
    """A pipe, a folder, a file that is gone or leads elsewhere: whoever loads the weights says what is wrong."""
    os.mkfifo(tmp_path / "pipe")

    def refused(path: Path) -> Any:
        raise PermissionError(path)

    finish(read_ahead([tmp_path / "gone", tmp_path], plain))
    finish(read_ahead([tmp_path / "pipe"], refused))
