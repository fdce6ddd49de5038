"""NumPy's `.npy`: an array of numbers, whose rows along the first axis are the column `value`. Nothing is unpickled."""

from __future__ import annotations

import tokenize
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from assay.corpus.arrays import StoredArray, chunks_of_arrays, copy_chosen, number_of_rows
from assay.corpus.errors import ShardError
from assay.corpus.format import Chunk, ColumnFacts, Format, Mask, Source, check_columns, check_length

COLUMN = "value"

# Longer ones, of structured types, could keep Python's parser busy.
_MOST_HEADER_BYTES = 10_000
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _read(source: Source, columns: Sequence[str]) -> Iterator[Chunk]:
    array = _stored(source)
    check_columns(columns, [COLUMN])
    yield from chunks_of_arrays(source.file, dict.fromkeys(columns, array), array.shape[0])


def _facts(source: Source) -> dict[str, ColumnFacts]:
    return {COLUMN: _stored(source).facts}


def _copy(source: Source, keep: Mask, file: BinaryIO) -> None:
    array = _stored(source)
    check_length(array.shape[0], keep)
    shape = (int(keep.sum()), *array.shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    copy_chosen(source.file, array, keep, file)


def _stored(source: Source) -> StoredArray:
    """Where the file's array lies. A ShardError unless it is one of numbers, whole and in order."""
    shape, is_fortran, dtype = _header(source.file)
    if dtype.hasobject:
        raise ShardError("holds Python objects, a pickle, which is never opened; save numbers with np.save")
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise ShardError(f"holds {dtype}; expected integers, floats up to 64 bits, or Booleans")
    if is_fortran and len(shape) > 1:
        raise ShardError("is stored column by column; save it row by row with np.save(path, np.ascontiguousarray(a))")
    if any(size < 0 for size in shape):
        raise ShardError(f"has the shape {shape}")
    array = StoredArray(dtype, shape, source.file.tell())
    end = array.start + array.nbytes
    if source.size != end:
        raise ShardError(f"has {source.size:,} bytes, where its header speaks of {end:,}: it is damaged or cut short")
    number_of_rows({COLUMN: array})
    return array


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in _READERS:
        raise ShardError(f"is of version {version[0]}.{version[1]}; expected an array of numbers, so 1.0 or 2.0")
    try:
        return _READERS[version](file, max_header_size=_MOST_HEADER_BYTES)
    except (SyntaxError, tokenize.TokenError, TypeError, AttributeError) as error:
        raise ShardError(f"its header cannot be read ({type(error).__name__})") from error


FORMAT = Format("npy", (".npy",), _read, _copy, _facts)
