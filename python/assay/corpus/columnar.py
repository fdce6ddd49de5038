"""Record batches of formats that Arrow reads: checked, cut into pieces, made into chunks, filtered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from assay.corpus import format as limits
from assay.corpus.arrow_numpy import array_of, filled_numbers_of, numbers_of
from assay.corpus.arrow_values import dense_type, is_any, run_places, values_of
from assay.corpus.dotted import Path, paths_of
from assay.corpus.errors import ShardError
from assay.corpus.format import Chunk, check_length

# Arrow's own format allows for more, but no implementation need take it, and a forged length costs nothing.
_MOST_BATCH_ROWS = (1 << 31) - 1

# Some rows, and the share of the shard that has been read with them.
Piece = tuple[pa.RecordBatch, float]


def chunks_of(pieces: Iterable[Piece], paths: Mapping[str, Path]) -> Iterator[Chunk]:
    """Pieces of a shard as chunks of the values at some paths, by name."""
    first = 0
    for piece, progress in pieces:
        faults: dict[int, str] = {}
        values = {name: _values_at(piece, name, path, faults) for name, path in paths.items()}
        yield Chunk(first, values, faults, piece.num_rows, progress)
        first += piece.num_rows


def chunks_of_columns(
    schema: pa.Schema, columns: Sequence[str], read: Callable[[list[str]], Iterable[Piece]]
) -> Iterator[Chunk]:
    """The same, of a shard whose columns are read whole: ``read`` gives the pieces of some."""
    paths = paths_of(schema, columns)
    whole = list(dict.fromkeys(path[0] for path in paths.values()))
    yield from chunks_of(joined(read(whole)), paths)


def counted(batches: Iterable[pa.RecordBatch], total: int, where: str) -> Iterator[Piece]:
    """The batches in pieces, each with the share read so far. A ShardError unless they have the ``total`` rows that the
    shard's ``where`` promises."""
    seen = 0
    for piece in pieces(batches):
        seen += piece.num_rows
        yield piece, seen / total if total else 1.0
    if seen != total:
        raise ShardError(f"holds {seen} rows where its {where} promises {total}")


def _values_at(piece: pa.RecordBatch, name: str, path: Path, faults: dict[int, str]) -> Sequence[Any]:
    """The values of a column, or of a struct's field: null where one of the structs is."""
    field, array = piece.schema.field(path[0]), piece.column(path[0])
    if len(path) == 1:
        return values_of(field, array, faults)
    is_null = np.zeros(len(array), bool)
    for key in path[1:]:
        is_null |= array.is_null().to_numpy(zero_copy_only=False)
        place = array.type.get_field_index(key)
        field, array = array.type.field(place), array.field(place)
    own: dict[int, str] = {}
    values = values_of(field.with_name(name), array, own)
    faults |= {i: fault for i, fault in own.items() if not is_null[i]}
    return [None if null else value for null, value in zip(is_null.tolist(), values, strict=True)]


def pieces(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches, checked, in slices of at most CHUNK_ROWS rows and, unless of one row, CHUNK_BYTES."""
    for batch in batches:
        check(batch)
        start = 0
        while start < batch.num_rows:
            part = batch.slice(start, limits.CHUNK_ROWS)
            ends = np.cumsum(_sizes(part))
            length = max(1, int(np.searchsorted(ends, limits.CHUNK_BYTES, side="right")))
            yield part.slice(0, length)
            start += length


def joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same rows in pieces as large as the limits allow: a chunk of a few rows costs as much as one of many."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    share = 0.0
    for piece, progress in pieces:
        piece_bytes = int(_sizes(piece).sum())
        if held and (rows + piece.num_rows > limits.CHUNK_ROWS or size + piece_bytes > limits.CHUNK_BYTES):
            yield from ((batch, share) for batch in _merged(held))
            held, rows, size = [], 0, 0
        held.append(piece)
        rows, size, share = rows + piece.num_rows, size + piece_bytes, progress
    if held:
        yield from ((batch, share) for batch in _merged(held))


def gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Small batches that pyarrow itself has made, in as few as reach CHUNK_ROWS or CHUNK_BYTES."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        held.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows >= limits.CHUNK_ROWS or size >= limits.CHUNK_BYTES:
            yield from _merged(held)
            held, rows, size = [], 0, 0
    if held:
        yield from _merged(held)


def _merged(parts: Sequence[pa.RecordBatch]) -> Sequence[pa.RecordBatch]:
    """The same rows in one batch, or as they are if pyarrow cannot join them: several dictionaries' values may be more
    than their indices can count."""
    if len(parts) == 1:
        return parts
    try:
        merged: list[pa.RecordBatch] = pa.Table.from_batches(parts).combine_chunks().to_batches()
    except pa.ArrowException:
        return parts
    return merged


def check(batch: pa.RecordBatch) -> None:
    """Raise unless every offset, index and length of a batch stays inside its buffers.

    Nothing may read a batch from a file before: pyarrow believes what it finds. No values are looked at: one
    that does not decode is a fault of its row.
    """
    if batch.num_rows > _MOST_BATCH_ROWS:
        raise ShardError(f"has a record batch of {batch.num_rows:,} rows; at most {_MOST_BATCH_ROWS:,} are possible")
    batch.validate()
    for column in batch.columns:
        column.view(_bare(column.type)).validate(full=True)


def _bare(kind: pa.DataType) -> pa.DataType:
    """A type of the same layout whose values are all valid: bytes for text, numbers for times of day."""
    if isinstance(kind, pa.BaseExtensionType):
        return _bare(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _bare(kind.value_type), kind.ordered)
    if pa.types.is_run_end_encoded(kind):
        return pa.run_end_encoded(kind.run_end_type, _bare(kind.value_type))
    if pa.types.is_nested(kind):
        return _nested(kind, [kind.field(i).with_type(_bare(kind.field(i).type)) for i in range(kind.num_fields)])
    if pa.types.is_time(kind) or pa.types.is_date64(kind):
        return pa.int32() if kind.bit_width == 32 else pa.int64()
    if pa.types.is_decimal(kind):
        return pa.binary(kind.byte_width)
    texts = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return texts.get(kind, kind)


def _nested(kind: pa.DataType, fields: Sequence[pa.Field]) -> pa.DataType:
    """The nested type with other fields."""
    if pa.types.is_struct(kind):
        return pa.struct(fields)
    if pa.types.is_union(kind):
        return pa.union(fields, kind.mode, kind.type_codes)
    if pa.types.is_map(kind):
        return pa.map_(*fields[0].type, keys_sorted=kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(fields[0], kind.list_size)
    for name in ("list", "large_list", "list_view", "large_list_view"):
        if is_any(kind, name):
            return getattr(pa, {"list": "list_"}.get(name, name))(fields[0])
    raise ShardError(f"holds a column of type {kind}, which is not supported")


def _row_bytes(array: pa.Array) -> npt.NDArray[np.int64]:
    """The bytes of each row once it stands alone, which a dictionary or a view may hold once for many."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _row_bytes(array.storage)
    if pa.types.is_dictionary(kind):
        indices = _filled(array.indices)
        of_values = _row_bytes(array.dictionary)
        return of_values[indices] if len(of_values) else np.zeros(len(array), np.int64)
    if pa.types.is_run_end_encoded(kind):
        of_values = _row_bytes(array.values)
        return of_values[run_places(array)]
    if kind in (pa.string_view(), pa.binary_view()):
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)
        lengths = views[array.offset : array.offset + len(array), 0]
        return _filled(pa.array(lengths, mask=array.is_null().to_numpy(zero_copy_only=False)))
    if is_any(kind, "string", "binary", "large_string", "large_binary"):
        return _filled(pc.binary_length(array))
    if is_any(kind, "list", "large_list", "map", "list_view", "large_list_view"):
        mean = -(-array.values.nbytes // max(1, len(array.values)))
        lengths = (
            array_of(np.diff(numbers_of(array.offsets))) if not _is_list_view(kind) else pc.list_value_length(array)
        )
        return _filled(lengths) * np.int64(mean)
    if pa.types.is_struct(kind):
        return _sum([_row_bytes(array.field(i)) for i in range(kind.num_fields)], len(array))
    return np.full(len(array), -(-array.nbytes // max(1, len(array))), np.int64)


def _is_list_view(kind: pa.DataType) -> bool:
    return is_any(kind, "list_view", "large_list_view")


def _filled(lengths: pa.Array) -> npt.NDArray[np.int64]:
    filled: npt.NDArray[np.int64] = filled_numbers_of(lengths).astype(np.int64)
    return filled


def _sizes(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    return _sum([_row_bytes(column) for column in batch.columns], batch.num_rows)


def _sum(sizes: Sequence[npt.NDArray[np.int64]], rows: int) -> npt.NDArray[np.int64]:
    total: npt.NDArray[np.int64] = np.sum([np.zeros(rows, np.int64), *sizes], axis=0)
    return total


def filtered(pieces: Iterable[Piece], keep: npt.NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
    """What ``keep`` says of the pieces' rows. A mask of another length is a ShardError, at the end."""
    seen = 0
    for piece, _ in pieces:
        mask = keep[seen : seen + piece.num_rows]
        seen += piece.num_rows
        if len(mask) == piece.num_rows and mask.any():
            columns = [_filtered(column, mask) for column in piece.columns]
            yield pa.RecordBatch.from_arrays(columns, schema=piece.schema)
    check_length(seen, keep)


def _filtered(array: pa.Array, mask: npt.NDArray[np.bool_]) -> pa.Array:
    """The array's rows where the mask is true, without the bytes of the others, which would be written with them."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(
            array.indices.filter(pa.array(mask)), array.dictionary, ordered=kind.ordered
        )
    if _is_list_view(kind):
        return _filtered_views(array, mask)
    bare = _bare(kind)
    dense = dense_type(bare)
    try:
        if dense == bare:
            return array.filter(pa.array(mask))
        return array.view(bare).cast(dense).filter(pa.array(mask)).cast(bare).view(kind)
    except pa.ArrowNotImplementedError:
        return _runs(array, mask)


def _filtered_views(array: pa.Array, mask: npt.NDArray[np.bool_]) -> pa.Array:
    """Rows of a list view, which pyarrow's own filter leaves pointing into all values."""
    kept = array.filter(pa.array(mask))
    sizes = _filled(pc.list_value_length(kept))
    values = kept.flatten()
    values = _filtered(values, np.ones(len(values), bool))
    make = pa.ListViewArray if pa.types.is_list_view(array.type) else pa.LargeListViewArray
    width = np.int32 if pa.types.is_list_view(array.type) else np.int64
    offsets = np.cumsum(sizes) - sizes
    parts = pa.array(offsets.astype(width)), pa.array(sizes.astype(width)), values
    return make.from_arrays(*parts, type=array.type, mask=kept.is_null())


def _runs(array: pa.Array, mask: npt.NDArray[np.bool_]) -> pa.Array:
    """The same for types that pyarrow cannot filter: one run of rows after the other."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return pa.concat_arrays([array.slice(start, end - start) for start, end in edges.reshape(-1, 2).tolist()])
