"""The vLLM plugin's copies: bounded, private, whole, and there as long as they are in use."""

import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_vllm import cache as module
from finetune_vllm.cache import Cache, Copy, Full, NotPrivate


def name(number: int) -> str:
    return f"{number:064x}"


def fill(size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / "file").write_bytes(bytes(size))


def add(cache: Cache, number: int, size: int = 10) -> Copy:
    return cache.add(name(number), size, fill(size)) or pytest.fail("another process was first")


def there(folder: Path) -> list[int]:
    return sorted(int(path.name, 16) for path in folder.iterdir() if not path.name.startswith("."))


def test_what_was_used_longest_ago_goes_first_and_nothing_that_is_in_use(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 30)
    kept = add(cache, 1)
    for number in (2, 3):
        add(cache, number).release()
    (cache.use(name(2)) or pytest.fail("gone")).release()
    add(cache, 4).release()
    assert there(tmp_path / "cache") == [1, 2, 4]
    add(cache, 5, 20).release()
    assert there(tmp_path / "cache") == [1, 5]
    with pytest.raises(Full, match=r"copies may take .* \(FINETUNE_ADAPTERS_CACHE_GIB\), and those in use take"):
        add(cache, 6, 21)
    assert there(tmp_path / "cache") == [1, 5]  # nothing went for what cannot fit
    kept.release()
    add(cache, 6, 21).release()
    assert there(tmp_path / "cache") == [6]


def test_what_another_process_uses_or_makes_is_in_use(tmp_path: Path) -> None:
    """Locks are by open file, so a second Cache is as good as a second process."""
    mine, other = Cache(tmp_path / "cache", 30), Cache(tmp_path / "cache", 30)
    add(other, 1)

    def meanwhile(folder: Path) -> None:
        assert other.use(name(2)) is None
        with pytest.raises(Full):
            add(other, 3, 11)
        fill(10)(folder)

    assert mine.add(name(2), 10, meanwhile) is not None
    assert there(tmp_path / "cache") == [1, 2]


def test_of_two_that_make_the_same_copy_one_is_first_and_no_half_is_seen(tmp_path: Path) -> None:
    mine, other = Cache(tmp_path / "cache", 100), Cache(tmp_path / "cache", 100)

    def meanwhile(folder: Path) -> None:
        (folder / "half").write_bytes(b"")
        assert add(other, 1).folder == tmp_path / "cache" / name(1)

    assert mine.add(name(1), 10, meanwhile) is None
    assert [path.name for path in (tmp_path / "cache" / name(1)).iterdir()] == ["file"]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock", name(1)]


def test_a_killed_process_holds_nothing_and_its_half_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 20)
    if (child := os.fork()) == 0:
        add(cache, 1)
        cache.add(name(2), 10, lambda folder: (fill(5)(folder), os._exit(0)))
    os.waitpid(child, 0)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    add(cache, 3, 20).release()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock", name(3)]


def test_a_damaged_copy_goes_but_not_the_one_that_has_its_place(tmp_path: Path) -> None:
    mine, other = Cache(tmp_path / "cache", 100), Cache(tmp_path / "cache", 100)
    mine_seen, others_seen = add(mine, 1), other.use(name(1)) or pytest.fail("gone")
    mine.discard(mine_seen)
    whole = add(mine, 1)
    other.discard(others_seen)
    assert (whole.folder / "file").is_file()
    mine.discard(whole)
    assert there(tmp_path / "cache") == []


def test_a_copy_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 100)
    with pytest.raises(ZeroDivisionError):
        cache.add(name(1), 10, lambda folder: (fill(5)(folder), 1 / 0))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_nobody_looks_at_a_failed_copy_while_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process would take it for a leftover, and fail where a file of it has just gone."""
    cache, seen = Cache(tmp_path / "cache", 100), []

    def watched(folder: Path, **_: object) -> None:
        with (tmp_path / "cache/.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(module._is_used(folder))

    monkeypatch.setattr(module.shutil, "rmtree", watched)
    with pytest.raises(ZeroDivisionError):
        cache.add(name(1), 10, lambda _: 1 / 0)
    assert seen == [True]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_bytes(bytes(1000))
    (tmp_path / "models").mkdir()
    tmp_path.chmod(0o700)
    add(Cache(tmp_path, 10), 1)
    assert (tmp_path / "notes").is_file()
    assert (tmp_path / "models").is_dir()


def test_the_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        add(Cache(tmp_path / "a/cache", 10), 1)
    finally:
        os.umask(before)
    for folder in ("a", "a/cache"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o2775, 0o702])
def test_a_folder_that_others_can_write_is_refused_and_one_below_it_is_not(tmp_path: Path, mode: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with pytest.raises(NotPrivate, match=rf"FINETUNE_ADAPTERS_CACHE: .*/shared can be written .* \(mode {mode:04o}\)"):
        Cache(shared, 10)
    add(Cache(shared / "mine", 10), 1)


def test_a_folder_of_another_user_is_refused_also_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", 10)
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    add(Cache(tmp_path / "link", 10), 1)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    for folder in ("cache", "link"):
        with pytest.raises(NotPrivate, match=r"FINETUNE_ADAPTERS_CACHE: .* belongs to another user \(uid \d+\): name"):
            Cache(tmp_path / folder, 10)
    with pytest.raises(NotPrivate):  # also one that changes hands later
        cache.use(name(1))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotPrivate, match=r"FINETUNE_ADAPTERS_CACHE: .*/file/x cannot be made: Not a directory: name"):
        Cache(tmp_path / "file/x", 10)
