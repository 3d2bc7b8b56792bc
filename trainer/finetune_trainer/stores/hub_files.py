"""Stop a hub's file at the size that the hub announced. huggingface_hub compares the two only at the end."""

from typing import Any, BinaryIO, Final

from huggingface_hub import file_download

from finetune_trainer.stores.hub_answers import UnsafeAnswer

_http_get: Final = file_download.http_get


class _Bounded:
    """A file that takes no more than `size` bytes."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._size:
            raise UnsafeAnswer(f"a file is longer than the {self._size} bytes that it announces")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def bounded_http_get(url: str, temp_file: Any, *, expected_size: int | None = None, **options: Any) -> None:
    """Do what the hub library's http_get does, and raise UnsafeAnswer at the first byte too many."""
    if expected_size is not None and not isinstance(temp_file, _Bounded):  # a retry calls this again
        temp_file = _Bounded(temp_file, expected_size)
    _http_get(url, temp_file, expected_size=expected_size, **options)
