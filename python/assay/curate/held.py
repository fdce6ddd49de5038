"""The scored rows of a folder, copied once into one nameless file, for questions that are asked again and again."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.corpus.errors import CorpusError
from assay.corpus.layout import table_path
from assay.corpus.score_files import ROW_GROUP_ROWS
from assay.curate.dataset import SHARD
from assay.curate.rows import Rows, read_batches

_PIECE = 1 << 24


@dataclass(frozen=True)
class HeldRows(Rows):
    """``values``: of all rows, shards after one another, scores of one number, (N,) float32 each. ``until``: when
    `time.monotonic` is beyond it, reading them is a CorpusError."""

    values: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    until: float = math.inf

    def stream(self, columns: Mapping[str, str]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """As that of `Rows`, without reading a table where scores and the shard's path are all that is asked for."""
        schema, stream = super().stream(columns)
        held = all(name in self.values or name == SHARD for name in columns.values())
        return schema, self._held(columns, schema) if held else stream

    def _held(self, columns: Mapping[str, str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        start = 0
        for shard, table in self.tables:
            end = start + table.scored
            for first in range(start, end, ROW_GROUP_ROWS):
                if time.monotonic() > self.until:
                    raise CorpusError("this takes too long here; `assay select` has no such limit")
                last = min(first + ROW_GROUP_ROWS, end)
                arrays = [pa.array(np.arange(first, last))]
                for name in columns.values():
                    if name == SHARD:
                        arrays.append(pa.array([shard.path] * (last - first)))
                    else:
                        arrays.append(pa.array(self.values[name][first:last].astype(np.float64)))
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)
            start = end


def hold(rows: Rows, names: Sequence[str]) -> HeldRows:
    """Read some scores of the tables once.

    CorpusError if one has other rows than its footer says, or the copy has no room among the temporary files.
    """
    held = scratch((len(names), len(rows)), np.float32)
    place = 0
    for shard, table in rows.tables:
        path, end = table_path(shard), place + table.scored
        for batch in read_batches(rows.store, path, ["row", *names]):
            if place + batch.num_rows > end:
                break
            for values, name in zip(held, names, strict=True):
                column = batch.column(name)
                if column.type != pa.float32():
                    raise CorpusError(f"{rows.store.full(path)}: {name} is not one number per row, as elsewhere")
                values[place : place + batch.num_rows] = column.to_numpy(zero_copy_only=False)
            place += batch.num_rows
        if place != end:
            raise CorpusError(f"{rows.store.full(path)}: has changed while it was read; run this again")
    return HeldRows(rows.store, rows.tables, rows.beside, dict(zip(names, held, strict=True)))


def scratch(shape: tuple[int, ...], kind: Any) -> npt.NDArray[Any]:
    """Zeros in a temporary file without a name, which goes when nothing refers to it, however the process ends.

    CorpusError if there is no room for it. (To write into a mapped file for which there is none would end the process.)
    """
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    if not size:
        return np.zeros(shape, kind)
    with tempfile.TemporaryFile(prefix="assay-") as file:
        try:
            for start in range(0, size, _PIECE):
                file.write(bytes(min(_PIECE, size - start)))
            file.flush()
        except OSError as error:
            raise CorpusError(
                f"{tempfile.gettempdir()}: no room for {size:,} bytes of scores ({error.strerror}); "
                "make some, or name another folder in the environment variable TMPDIR"
            ) from error
        return np.memmap(file, kind, "r+", shape=shape)
