"""Reading a shard as a stream of small chunks: memory follows the chunk, never the file."""

from __future__ import annotations

import contextlib
import difflib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from assay.corpus.decompress import MAX_LINE_BYTES, lines
from assay.corpus.errors import BadRow, ShardError
from assay.corpus.shards import Shard

CHUNK_ROWS = 1024
CHUNK_BYTES = 16 << 20

_ARROW_FILE_MAGIC = b"ARROW1"
# Every message of an Arrow stream starts with the first, and the second ends the stream.
_STREAM_MARK = b"\xff\xff\xff\xff"
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a shard.

    ``first`` is the physical index of the first row; every column holds one Python value per row (a numeric
    list as a numpy array). ``faults`` names the rows that could not be read at all, by offset; their values
    are None. ``progress`` is the share of the shard that has been read.
    """

    first: int
    columns: Mapping[str, Sequence[Any]]
    faults: Mapping[int, str]
    length: int
    progress: float


def read(shard: Shard, columns: Sequence[str]) -> Iterator[Chunk]:
    """The shard's rows in physical order, every one. ShardError if it cannot be read to its end."""
    with shard_errors(), shard.store.open(shard.path) as file:
        if shard.format == "jsonl":
            yield from _json_chunks(file, shard, columns)
            return
        first = 0
        for batch, progress in record_batches(file, shard, columns):
            faults: dict[int, str] = {}
            values = {name: _values(name, batch.column(name), faults) for name in columns}
            yield Chunk(first, values, faults, batch.num_rows, progress)
            first += batch.num_rows


@contextlib.contextmanager
def shard_errors() -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into a ShardError of one line."""
    try:
        yield
    except ShardError:
        raise
    except (OSError, EOFError, ValueError, KeyError, pa.ArrowException, zlib.error) as error:
        raise ShardError(_one_line(error)) from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # zstandard is optional, so its error has no importable name
            raise
        raise ShardError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def record_batches(
    file: BinaryIO, shard: Shard, columns: Sequence[str] | None = None
) -> Iterator[tuple[pa.RecordBatch, float]]:
    """The batches of a Parquet or Arrow shard, at most CHUNK_ROWS long, each with the share read so far.

    ``columns`` restricts what is read; None reads every column.
    """
    if shard.format == "parquet":
        parquet = pq.ParquetFile(file)
        _check_columns(columns, parquet.schema_arrow.names)
        batches = parquet.iter_batches(batch_size=CHUNK_ROWS, columns=columns)
        total = parquet.metadata.num_rows
    else:
        batches, total = _arrow_batches(file, columns)
    seen = 0
    for batch in batches:
        for start in range(0, batch.num_rows, CHUNK_ROWS):
            part = batch.slice(start, CHUNK_ROWS)
            seen += part.num_rows
            yield part, (seen / total if total else 1.0)
    if total is not None and seen != total:
        raise ShardError(f"holds {seen} rows where its footer promises {total}")


def open_arrow(file: BinaryIO) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema and the batches of an Arrow file or stream; a stream cut off between two batches raises."""
    magic = file.read(len(_ARROW_FILE_MAGIC))
    if magic == _ARROW_FILE_MAGIC:
        reader = pa.ipc.open_file(file)
        return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
    if magic[:4] == b"FEA1":
        raise ShardError("Feather version 1 is not supported; write it again as version 2")
    # To pyarrow a stream that simply stops is complete. Every writer marks the end, so its absence is a loss.
    # (Streams from before 2019 have no marks; they are taken at their word.)
    file.seek(max(0, file.seek(0, 2) - len(_STREAM_END)))
    if magic.startswith(_STREAM_MARK) and file.read() != _STREAM_END:
        raise ShardError("the Arrow stream has no end marker: the file is truncated")
    file.seek(0)
    stream = pa.ipc.open_stream(file)
    return stream.schema, iter(stream)


def _arrow_batches(file: BinaryIO, columns: Sequence[str] | None) -> tuple[Iterator[pa.RecordBatch], int | None]:
    schema, batches = open_arrow(file)
    _check_columns(columns, schema.names)
    if columns is None:
        return batches, None
    return (batch.select(columns) for batch in batches), None


def _check_columns(wanted: Sequence[str] | None, present: Sequence[str]) -> None:
    for name in wanted or ():
        if present.count(name) > 1:
            raise ShardError(f"has {present.count(name)} columns named {name!r}; expected one")
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ShardError(f"has no column {name!r}, only {', '.join(map(repr, present[:20]))}{hint}")


def _values(name: str, array: pa.Array, faults: dict[int, str]) -> Sequence[Any]:
    """An Arrow array as Python values; rows that do not decode become None and a fault."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if _is_numeric_list(array.type):
        return _numeric_lists(array)
    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        return list(array.to_pylist())
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        return [_string(name, i, scalar, faults) for i, scalar in enumerate(array)]


def _string(name: str, offset: int, scalar: pa.Scalar, faults: dict[int, str]) -> str | None:
    try:
        value: str | None = scalar.as_py()
        return value
    except UnicodeDecodeError:
        faults[offset] = f"{name} is not valid UTF-8"
        return None


def _is_numeric_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(is_list(kind) for is_list in lists) and any(is_number(kind.value_type) for is_number in numbers)


def _numeric_lists(array: pa.Array) -> list[np.ndarray[Any, Any] | None]:
    """Views into one flat array: an object per number would cost more than scoring. Nulls are NaN."""
    flat = array.flatten().to_numpy(zero_copy_only=False)
    if flat.dtype == object:  # how pyarrow hands out Booleans with nulls
        flat = flat.astype(np.float32)
    sizes = pc.list_value_length(array).to_pylist()
    ends = np.cumsum([size or 0 for size in sizes])
    return [None if size is None else flat[end - size : end] for size, end in zip(sizes, ends.tolist(), strict=True)]


def _json_chunks(file: BinaryIO, shard: Shard, columns: Sequence[str]) -> Iterator[Chunk]:
    size = max(1, shard.fingerprint().size)
    first, held, rows = 0, 0, []
    for line in lines(file, shard.compression):
        rows.append(line)
        held += len(line)
        if len(rows) == CHUNK_ROWS or held >= CHUNK_BYTES:
            yield _json_chunk(first, rows, columns, file.tell() / size)
            first, held, rows = first + len(rows), 0, []
    if rows:
        yield _json_chunk(first, rows, columns, 1.0)


def _json_chunk(first: int, rows: Sequence[bytes], columns: Sequence[str], progress: float) -> Chunk:
    values: dict[str, list[Any]] = {name: [None] * len(rows) for name in columns}
    faults: dict[int, str] = {}
    for offset, line in enumerate(rows):
        try:
            record = _record(line, columns, is_first=first + offset == 0)
        except BadRow as fault:  # noqa: PERF203 - a fault concerns its own line only
            faults[offset] = str(fault)
        else:
            for name in columns:
                values[name][offset] = record[name]
    return Chunk(first, values, faults, len(rows), min(progress, 1.0))


def _record(line: bytes, columns: Sequence[str], is_first: bool) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise BadRow(f"line is longer than {MAX_LINE_BYTES >> 20} MiB")
    if not line.strip():
        raise BadRow("line is blank")
    try:
        record = json.loads(line.decode("utf-8-sig" if is_first else "utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("line is not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"line is not valid JSON ({type(error).__name__})") from error
    if not isinstance(record, dict):
        raise BadRow(f"line is a JSON {type(record).__name__}, expected an object")
    for name in columns:
        if name not in record:
            raise BadRow(f"line has no key {name!r}")
    return record
