"""Safetensors: tensors of equally many rows along their first axes are the columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import numpy as np

from assay._json import dumps
from assay.corpus.arrays import StoredArray, chunks_of_arrays, copy_chosen, number_of_rows
from assay.corpus.errors import ShardError
from assay.corpus.format import Chunk, ColumnFacts, Format, Mask, Source, check_columns
from assay.corpus.safetensors_header import METADATA, Header, TensorFacts, read_header

_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?", "U8": "u1", "I8": "i1"},
    **{f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "UI" for size in (2, 4, 8)},
}


def _read(source: Source, columns: Sequence[str]) -> Iterator[Chunk]:
    _, arrays, rows = _stored(source)
    check_columns(columns, list(arrays))
    yield from chunks_of_arrays(source.file, {name: arrays[name] for name in columns}, rows)


def _facts(source: Source) -> dict[str, ColumnFacts]:
    return {name: array.facts for name, array in _stored(source)[1].items()}


def _copy(source: Source, keep: Mask, file: BinaryIO) -> None:
    header, arrays, _ = _stored(source)
    count = int(keep.sum())
    entries: dict[str, object] = {METADATA: header.metadata} if header.metadata else {}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + count * array.row_bytes
        shape = [count, *array.shape[1:]]
        entries[name] = {"dtype": header.tensors[name].dtype, "shape": shape, "data_offsets": [start, end]}
    text = dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        copy_chosen(source.file, array, keep, file)


def _stored(source: Source) -> tuple[Header, Mapping[str, StoredArray], int]:
    """The file's header, in the order of the file its tensors, and how many rows these have."""
    header = read_header(source.file, source.size)
    arrays: dict[str, StoredArray] = {}
    end = 0
    for name, facts in sorted(header.tensors.items(), key=lambda item: item[1].offsets):
        if facts.offsets[0] != end:
            raise ShardError(f"has its tensor {name[:80]!r} at byte {facts.offsets[0]:,}; expected it at {end:,}")
        arrays[name] = _array(name, facts, header.start)
        end = facts.offsets[1]
    return header, arrays, number_of_rows(arrays)


def _array(name: str, facts: TensorFacts, start: int) -> StoredArray:
    if facts.dtype not in _DTYPES:
        raise ShardError(f"has the tensor {name[:80]!r} of type {facts.dtype}; expected one of {', '.join(_DTYPES)}")
    dtype = np.dtype(_DTYPES[facts.dtype])
    first, last = facts.offsets
    if last - first != math.prod(facts.shape) * dtype.itemsize:
        raise ShardError(f"has {last - first:,} bytes for {name[:80]!r}, a {facts.dtype} tensor of shape {facts.shape}")
    return StoredArray(dtype, facts.shape, start + first, is_bfloat16=facts.dtype == "BF16")


FORMAT = Format("safetensors", (".safetensors",), _read, _copy, _facts)
