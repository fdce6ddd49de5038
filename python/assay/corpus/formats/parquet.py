"""Parquet: read a few rows at a time, however large its row groups; copied with its schema, metadata and codecs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow.parquet as pq

from assay.corpus import format as limits
from assay.corpus.columnar import Piece, chunks_of, counted, filtered, gathered
from assay.corpus.dotted import paths_of
from assay.corpus.facts import facts_of_schema
from assay.corpus.format import Chunk, ColumnFacts, Format, Mask, Source, check_length
from assay.corpus.score_files import regroup

_MAX_GROUP_ROWS = 1 << 16
# A dictionary lets a small file unfold a large value for every row, and its sizes are known only when decoded.
_DICTIONARY_ROWS = 16
_DICTIONARY_ENCODINGS = {"RLE_DICTIONARY", "PLAIN_DICTIONARY"}


def _read(source: Source, columns: Sequence[str]) -> Iterator[Chunk]:
    parquet = _open(source)
    paths = paths_of(parquet.schema_arrow, columns)
    # What lies below a column that is read comes with it, and must not be named again.
    own = [path for path in paths.values() if not any(path[:i] in paths.values() for i in range(1, len(path)))]
    yield from chunks_of(_batches(parquet, [".".join(path) for path in own]), paths)


def _facts(source: Source) -> dict[str, ColumnFacts]:
    return facts_of_schema(_open(source).schema_arrow, source.features)


def _copy(source: Source, keep: Mask, file: BinaryIO) -> None:
    parquet = _open(source)
    schema, facts = parquet.schema_arrow, parquet.metadata
    group_rows = _MAX_GROUP_ROWS
    if facts.num_row_groups:
        group_rows = min(group_rows, max(1, facts.row_group(0).num_rows))
    with pq.ParquetWriter(file, schema, compression=_codecs(facts)) as writer:
        for table in regroup(filtered(_batches(parquet, None), keep), schema, group_rows):
            writer.write_table(table)
    check_length(facts.num_rows, keep)


def _open(source: Source) -> pq.ParquetFile:
    # Through a buffer a column's pages come one after the other. Elsewhere each of its fills would be a request.
    return pq.ParquetFile(source.file, pre_buffer=False, buffer_size=1 << 20 if source.is_local else 0)


def _batches(parquet: pq.ParquetFile, columns: Sequence[str] | None) -> Iterator[Piece]:
    """Pieces of the file, each with the share read so far; ``columns`` None takes all."""
    rows = _batch_rows(parquet.metadata, columns)
    batches = parquet.iter_batches(batch_size=rows, columns=columns, use_threads=False)
    return counted(gathered(batches), parquet.metadata.num_rows, "footer")


def _batch_rows(facts: pq.FileMetaData, columns: Sequence[str] | None) -> int:
    """How many rows to decode at once, judged by the row groups' mean sizes."""
    rows = limits.CHUNK_ROWS
    places = [i for i in range(facts.num_columns) if _is_among(facts.schema.column(i).path, columns)]
    for group in map(facts.row_group, range(facts.num_row_groups)):
        parts = [group.column(i) for i in places]
        size = sum(part.total_uncompressed_size for part in parts)
        rows = min(rows, limits.CHUNK_BYTES * max(1, group.num_rows) // max(1, size))
        if any(part.physical_type == "BYTE_ARRAY" and _DICTIONARY_ENCODINGS & {*part.encodings} for part in parts):
            rows = min(rows, _DICTIONARY_ROWS)
    return max(1, rows)


def _is_among(path: str, columns: Sequence[str] | None) -> bool:
    return columns is None or any(path == name or path.startswith(f"{name}.") for name in columns)


def _codecs(facts: pq.FileMetaData) -> str | dict[str, str]:
    if not facts.num_row_groups:
        return "snappy"  # a file without rows used none
    group = facts.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    return {c.path_in_schema: "NONE" if c.compression == "UNCOMPRESSED" else c.compression for c in columns}


FORMAT = Format("parquet", (".parquet",), _read, _copy, _facts)
