"""Score tables on disk: written in one piece when the shard is complete, read one column at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from assay.corpus.errors import CorpusError
from assay.corpus.storage import Store, may_pass
from assay.corpus.tables import ScoreColumn, make_table, parse_metadata, score_schema

ROW_GROUP_ROWS = 1 << 16
GROUP_BYTES = 128 << 20
# Of nearly all tables all of the footer, read at once.
_FOOTER_BYTES = 64 << 10
_MOST_FOOTER_BYTES = 64 << 20


class ScoreWriter:
    """Collects a shard's scores in ``spool``, in row order, and writes the table at the end.

    The spool is a nameless temporary file: the footer's facts (rows, methods' findings) are known only after
    the last row, and a killed run leaves nothing behind.
    """

    def __init__(self, columns: Sequence[ScoreColumn], spool: IO[bytes]) -> None:
        self.rows = 0
        self._columns = columns
        self._spool = spool
        self._stream = pa.ipc.new_stream(spool, score_schema(columns, {}))

    def add(self, rows: npt.ArrayLike, ids: Sequence[str], scores: Mapping[str, npt.NDArray[Any]]) -> None:
        """Append scored rows."""
        table = make_table(rows, ids, scores, self._columns, {})
        self._stream.write_table(table)
        self.rows += table.num_rows

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Append scored rows that another writer has put into a batch of this table's columns."""
        if batch.num_rows:
            self._stream.write_batch(batch)
        self.rows += batch.num_rows

    def save(self, store: Store, path: str, metadata: Mapping[str, Any]) -> None:
        """Write the table under its final name, with ``metadata`` in its footer."""
        self._stream.close()
        self._spool.seek(0)
        schema = score_schema(self._columns, metadata)
        with (
            store.write(path) as file,
            # Every id and nearly every score is unique: dictionaries would only cost.
            pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer,
        ):
            for group in regroup(pa.ipc.open_stream(self._spool), schema, ROW_GROUP_ROWS):
                writer.write_table(group, row_group_size=ROW_GROUP_ROWS)


def regroup(batches: Iterable[pa.RecordBatch], schema: pa.Schema, rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of at least ``rows`` rows or GROUP_BYTES, the last one aside, under ``schema``."""
    held: list[pa.RecordBatch] = []
    count = size = 0
    for batch in batches:
        held.append(batch.replace_schema_metadata(schema.metadata))
        count += batch.num_rows
        size += batch.nbytes
        if count >= rows or size >= GROUP_BYTES:
            yield pa.Table.from_batches(held, schema)
            held, count, size = [], 0, 0
    if count:
        yield pa.Table.from_batches(held, schema)


@dataclass(frozen=True)
class ScoreFile:
    """What a score table says about itself without its rows."""

    path: str
    rows: int
    metadata: Mapping[str, Any]


def open_score_file(store: Store, path: str) -> ScoreFile | None:
    """A score table's footer; None if there is none. A foreign file is a CorpusError."""
    try:
        # Not its Arrow schema, which takes longer to make than all the rest.
        facts = pq.ParquetFile(pa.BufferReader(_footer(store, path))).metadata
        return ScoreFile(path, facts.num_rows, parse_metadata(facts.metadata))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (pa.ArrowException, ValueError, OSError, RecursionError) as error:
        if may_pass(error):
            raise
        detail = " ".join(str(error).split())
        raise CorpusError(
            f"{store.full(path)}: not a readable score table ({detail}); move it away to have it made again"
        ) from error


def _footer(store: Store, path: str) -> bytes:
    """A Parquet file from its footer on, or from before it."""
    tail = store.read_tail(path, _FOOTER_BYTES)
    size = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < _FOOTER_BYTES or size <= len(tail):
        return tail
    if size > _MOST_FOOTER_BYTES:
        raise ValueError(f"its footer has {size:,} bytes, which no such file's has")
    return store.read_tail(path, size)


@contextlib.contextmanager
def opened_table(store: Store, path: str) -> Iterator[pq.ParquetFile]:
    """A score table whose batches are read one after another: left to itself, pyarrow keeps all that it has read."""
    with store.open(path) as file:
        yield pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20 if store.is_local else 0)


def stream_score(store: Store, path: str, name: str) -> Iterator[npt.NDArray[np.float32]]:
    """One of a score table's scores, a batch in memory at a time. A CorpusError unless it is one number per row."""
    with opened_table(store, path) as table:
        kind = table.schema_arrow.field(name).type
        if kind != pa.float32():
            raise CorpusError(f"{name}: {store.full(path)} holds {kind} per row; expected one number to judge by")
        for batch in table.iter_batches(columns=[name], batch_size=ROW_GROUP_ROWS):
            yield batch.column(name).to_numpy(zero_copy_only=False)


def rows_at(store: Store, path: str, places: Sequence[int]) -> list[dict[str, Any]]:
    """Row, id and every one-number score at some places of a score table, in the places' order.

    Of the row groups only those that hold a place are read.
    """
    with store.open(path) as file:
        parquet = pq.ParquetFile(file)
        facts, schema = parquet.metadata, parquet.schema_arrow
        names = [field.name for field in schema if field.name in ("row", "id") or field.type == pa.float32()]
        ends = np.cumsum([facts.row_group(i).num_rows for i in range(facts.num_row_groups)], dtype=np.int64)
        groups = np.searchsorted(ends, places, side="right").tolist()
        found: dict[int, dict[str, Any]] = {}
        for group in sorted(set(groups)):
            start = int(ends[group]) - facts.row_group(group).num_rows
            here = [place for place, its in zip(places, groups, strict=True) if its == group]
            table = parquet.read_row_group(group, columns=names).take([place - start for place in here])
            found |= zip(here, table.to_pylist(), strict=True)
    return [found[place] for place in places]


def score_field(store: Store, path: str, name: str) -> pa.Field:
    """The field of one score: its metadata says which end to keep."""
    return table_schema(store, path).field(name)


def table_schema(store: Store, path: str) -> pa.Schema:
    """A score table's columns."""
    with store.open(path) as file:
        return pq.ParquetFile(file).schema_arrow
