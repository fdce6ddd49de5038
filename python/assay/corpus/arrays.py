"""Arrays in files: their rows along the first axis, read and copied a bounded part at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from assay.corpus import format as limits
from assay.corpus.compression import MAX_LINE_BYTES
from assay.corpus.errors import ShardError
from assay.corpus.format import Chunk, ColumnFacts, Mask, check_length


@dataclass(frozen=True)
class StoredArray:
    """Where an array's numbers lie in a file, row after row."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    is_bfloat16: bool = False
    """Whether its 16-bit integers are the upper halves of float32 numbers."""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def facts(self) -> ColumnFacts:
        dtype = np.dtype(np.float32) if self.is_bfloat16 else self.dtype.newbyteorder("=")
        text = str(pa.from_numpy_dtype(dtype))
        return ColumnFacts("list<" * (len(self.shape) - 1) + text + ">" * (len(self.shape) - 1))

    def values(self, file: BinaryIO, first: int, count: int) -> list[Any]:
        """Some rows: numbers of a one-dimensional array, else an array each."""
        rows = np.frombuffer(self._bytes(file, first, count), self.dtype).reshape(count, *self.shape[1:])
        if self.is_bfloat16:
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        elif self.dtype.kind == "b":
            rows = rows.view(np.uint8) != 0
        else:
            rows = rows.astype(self.dtype.newbyteorder("="), copy=False)
        return list(rows.tolist() if rows.ndim == 1 else rows)

    def chosen(self, file: BinaryIO, first: int, keep: Mask) -> bytes:
        """The bytes of those rows from ``first`` on for which the mask is true."""
        rows = np.frombuffer(self._bytes(file, first, len(keep)), np.uint8).reshape(len(keep), self.row_bytes)
        return bytes(rows[keep].tobytes())

    def _bytes(self, file: BinaryIO, first: int, count: int) -> bytes:
        file.seek(self.start + first * self.row_bytes)
        data = file.read(count * self.row_bytes)
        if len(data) < count * self.row_bytes:
            raise EOFError("became shorter while it was read")
        return data


def number_of_rows(arrays: Mapping[str, StoredArray]) -> int:
    """How many rows all of them have. A ShardError unless they have the same number, each with numbers in it."""
    first = None
    for name, array in arrays.items():
        if not array.shape:
            raise ShardError(f"{name!r} is a single number; expected rows along a first axis")
        if array.shape[0] and not 0 < array.row_bytes <= MAX_LINE_BYTES:
            raise ShardError(f"{name!r} has rows of {array.row_bytes:,} bytes; expected 1 to {MAX_LINE_BYTES:,}")
        first = first or (name, array.shape[0])
        if array.shape[0] != first[1]:
            raise ShardError(f"{first[0]!r} has {first[1]:,} rows and {name!r} {array.shape[0]:,}; expected as many")
    if first is None:
        raise ShardError("holds no array")
    return first[1]


def chunks_of_arrays(file: BinaryIO, arrays: Mapping[str, StoredArray], rows: int) -> Iterator[Chunk]:
    """The rows of some columns."""
    for first, count in _parts(sum(array.row_bytes for array in arrays.values()), rows):
        values = {name: array.values(file, first, count) for name, array in arrays.items()}
        yield Chunk(first, values, {}, count, (first + count) / rows)


def copy_chosen(file: BinaryIO, array: StoredArray, keep: Mask, out: BinaryIO) -> None:
    """Write an array's chosen rows as they stand in the file."""
    check_length(array.shape[0], keep)
    for first, count in _parts(array.row_bytes, len(keep)):
        out.write(array.chosen(file, first, keep[first : first + count]))


def _parts(row_bytes: int, rows: int) -> Iterator[tuple[int, int]]:
    step = max(1, min(limits.CHUNK_ROWS, limits.CHUNK_BYTES // max(1, row_bytes)))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)
