"""What a selection makes of one shard, and the table that says so row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from assay.corpus.layout import selection_path, table_path
from assay.corpus.quarantine import read_quarantine
from assay.corpus.score_files import stream_ids
from assay.corpus.scores_folder import Scored
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.corpus.tables import ROW_AND_ID

_ROW_GROUP_ROWS = 1 << 16


@dataclass(frozen=True)
class ShardSelection:
    """One shard's scored rows, and what the selection over all shards makes of them."""

    shard: Shard
    table: Scored
    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    kept: npt.NDArray[np.bool_]
    reasons: npt.NDArray[np.object_]
    weights: npt.NDArray[np.float64] | None
    weight_scale: float
    """What makes the weights' mean 1 over all kept rows of all shards."""
    first: int | None
    """How many rows lie in the shards before it; None if one of them could not be read."""

    @property
    def total(self) -> int:
        """The shard's physical rows."""
        return self.table.rows

    def keep(self) -> npt.NDArray[np.bool_]:
        """One Boolean per physical row; quarantined rows are not kept."""
        keep = np.zeros(self.total, bool)
        keep[self.rows] = self.kept
        return keep


def write_fates(store: Store, chosen: ShardSelection, name: str, output: Store) -> None:
    """Write what became of every row of the shard, with its score and the reason."""
    schema = pa.schema(
        [
            ROW_AND_ID[0],
            pa.field("id", pa.string()),  # null where quarantine took a row without one
            pa.field(name, pa.float32()),
            pa.field("kept", pa.bool_(), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
            *([pa.field("weight", pa.float64())] if chosen.weights is not None else []),
        ]
    )
    with (
        output.write(selection_path(chosen.shard)) as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for columns in _selection_columns(store, chosen):
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _selection_columns(store: Store, chosen: ShardSelection) -> Iterator[list[pa.Array]]:
    """Row, id, score, kept, reason and weight of every row of the shard, a row group at a time."""
    ids = stream_ids(store, table_path(chosen.shard))
    quarantined = read_quarantine(store, chosen.shard)
    for start in range(0, chosen.total, _ROW_GROUP_ROWS):
        size = min(_ROW_GROUP_ROWS, chosen.total - start)
        first, last = np.searchsorted(chosen.rows, [start, start + size])
        here = slice(first, last)
        places = chosen.rows[here] - start
        columns = {"id": np.full(size, None, object), "reason": np.full(size, None, object)}
        columns["id"][places] = list(islice(ids, last - first))
        columns["reason"][places] = chosen.reasons[here]
        missing = np.setdiff1d(np.arange(size), places, assume_unique=True)
        for place, entry in zip(missing.tolist(), islice(quarantined, len(missing)), strict=True):
            columns["id"][place] = entry.id
            columns["reason"][place] = f"quarantined: {entry.reason}"
        scored = np.zeros(size, bool)
        scored[places] = True
        arrays = [
            pa.array(np.arange(start, start + size)),
            pa.array(columns["id"], pa.string()),
            _spread(chosen.scores[here], places, scored),
            pa.array(_spread(chosen.kept[here], places, scored).fill_null(False)),
            pa.array(columns["reason"], pa.string()),
        ]
        if chosen.weights is not None:
            arrays.append(_spread(chosen.weights[here], places, scored))
        yield arrays


def _spread(values: npt.NDArray[Any], places: npt.NDArray[np.int64], scored: npt.NDArray[np.bool_]) -> pa.Array:
    """The scored rows' values at their places, null elsewhere."""
    spread = np.zeros(len(scored), values.dtype)
    spread[places] = values
    return pa.array(spread, mask=~scored, from_pandas=False)
