"""Token ids of many rows in compact memory, shared by Python and Arrow."""

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Final, overload

#: Rows of one Arrow chunk: within a chunk Arrow counts tokens with 32 bits.
_CHUNK_ROWS: Final = 4096


class TokenLists(Sequence[list[int]]):
    """Lists of token ids in one block of memory: 4 bytes per token, a tenth of Python lists."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._ends = array("q", [0])

    def append(self, ids: Sequence[int]) -> None:
        self._tokens.extend(array("i", ids))
        self._ends.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, wanted: int) -> list[int]: ...
    @overload
    def __getitem__(self, wanted: slice) -> list[list[int]]: ...
    def __getitem__(self, wanted: int | slice) -> list[int] | list[list[int]]:
        if isinstance(wanted, slice):
            return [self[index] for index in range(len(self))[wanted]]
        index = range(len(self))[wanted]
        return self._tokens[self._ends[index] : self._ends[index + 1]].tolist()

    def arrays(self) -> "Iterator[array[int]]":
        """Yield each list as 32-bit integers: its bytes are at hand, without a Python number for each."""
        for start, end in zip(self._ends, self._ends[1:], strict=False):
            yield self._tokens[start:end]

    @property
    def tokens(self) -> int:
        """Tokens of all lists together."""
        return len(self._tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest list; 0 if there is none."""
        return max(self.lengths, default=0)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each list."""
        return [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]

    def arrow(self) -> Any:
        """Return the same as an Arrow column. Tokens are not copied: nothing can be appended while it lives."""
        import numpy
        import pyarrow

        tokens = pyarrow.Array.from_buffers(pyarrow.int32(), len(self._tokens), [None, pyarrow.py_buffer(self._tokens)])
        ends = numpy.frombuffer(self._ends, dtype=numpy.int64)
        chunks = []
        for first in range(0, len(self), _CHUNK_ROWS):
            part = ends[first : first + _CHUNK_ROWS + 1]
            offsets = pyarrow.array((part - part[0]).astype(numpy.int32))
            chunks.append(pyarrow.ListArray.from_arrays(offsets, tokens[part[0] : part[-1]]))
        return pyarrow.chunked_array(chunks, pyarrow.list_(pyarrow.int32()))
