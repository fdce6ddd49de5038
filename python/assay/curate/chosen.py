"""What a selection makes of one shard, and the table that says so row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from assay.corpus.errors import CorpusError
from assay.corpus.layout import selection_path, table_path
from assay.corpus.quarantine import Quarantined, read_quarantine
from assay.corpus.scores_folder import Scored
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.corpus.tables import ROW_AND_ID
from assay.curate.rows import read_batches
from assay.curate.whole import quarantined_rows
from assay.select import Selection
from assay.select.groups import Groups

BLOCK_ROWS = 1 << 16
_OWN = ("row", "id", "kept", "reason", "weight", "copies", "group", "threshold")


@dataclass(frozen=True)
class ShardSelection:
    """One shard's scored rows, and what the selection over all shards makes of them."""

    store: Store
    """The scores."""
    shard: Shard
    table: Scored
    scores: npt.NDArray[np.float32]
    whole: Selection
    """Of the rows of all shards after one another."""
    part: slice
    """Where this one's lie among them."""
    weight_scale: float
    """What makes the weights' mean 1 over all kept rows of all shards."""
    first: int | None
    """How many rows lie in the shards before it; None if one of them could not be read."""
    groups: Groups | None = None
    """Which each of the rows of all shards is of, where the rule looks at groups."""
    image_column: str | None = None
    """In which its rows name files, if they do; empty where nobody knows."""

    @property
    def total(self) -> int:
        """The shard's physical rows."""
        return self.table.rows

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """One Boolean per scored row."""
        return self.whole.mask[self.part]

    @property
    def weights(self) -> npt.NDArray[np.float64] | None:
        """One number per scored row, if the rule gives any."""
        return None if self.whole.weights is None else self.whole.weights[self.part]

    @property
    def copies(self) -> npt.NDArray[np.uint8] | None:
        """How often each scored row is to be there, if not once where it is kept."""
        return None if self.whole.copies is None else self.whole.copies[self.part]

    @cached_property
    def scored(self) -> npt.NDArray[np.bool_]:
        """One Boolean per physical row: whether it has scores, or is in quarantine."""
        scored = np.ones(self.total, bool)
        scored[quarantined_rows(self.store, self.shard, self.table)] = False
        return scored

    def keep(self, times: int = 1) -> npt.NDArray[np.bool_]:
        """One Boolean per physical row: whether it is to be there so often."""
        return self.times() >= times

    def times(self) -> npt.NDArray[np.uint8]:
        """Of each physical row, how often it is to be there; one in quarantine is not."""
        times = self.scored.astype(np.uint8)
        times[self.scored] = self.kept if self.copies is None else self.copies
        return times


def score_column(name: str) -> str:
    """What the column of the score is called in the table of fates, whose other columns have names of their own."""
    return f"score {name}" if name in _OWN else name


def write_fates(store: Store, chosen: ShardSelection, name: str, output: Store) -> None:
    """Write what became of every row of the shard, with its score and the reason."""
    schema = pa.schema(
        [
            ROW_AND_ID[0],
            pa.field("id", pa.string()),  # null where quarantine took a row without one
            pa.field(score_column(name), pa.float32()),
            pa.field("kept", pa.bool_(), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
            *([pa.field("weight", pa.float64())] if chosen.weights is not None else []),
            *([pa.field("copies", pa.uint8())] if chosen.copies is not None else []),
            *([pa.field("group", pa.string())] if chosen.groups is not None else []),
            *([pa.field("threshold", pa.float64())] if chosen.whole.limits is not None else []),
        ]
    )
    with (
        output.write(selection_path(chosen.shard)) as file,
        # Dictionaries of what never repeats would only cost.
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["reason", "group"]) as writer,
    ):
        for columns in _selection_columns(store, chosen):
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _selection_columns(store: Store, chosen: ShardSelection) -> Iterator[list[pa.Array]]:
    """The schema's columns of every row of the shard, a block of rows at a time."""
    ids = Ids(store, table_path(chosen.shard))
    quarantined = read_quarantine(store, chosen.shard)
    legend = pa.array(chosen.whole.legend, pa.string())
    first = 0
    for start in range(0, chosen.total, BLOCK_ROWS):
        scored = chosen.scored[start : start + BLOCK_ROWS]
        here = slice(first, first := first + int(np.count_nonzero(scored)))
        codes = pa.array(chosen.whole.codes[chosen.part][here])
        columns: list[pa.Array] = [
            ids.take(here.stop - here.start),
            pa.array(chosen.scores[here], from_pandas=False),
            pa.array(chosen.kept[here]),
            pa.DictionaryArray.from_arrays(codes, legend).cast(pa.string()),
        ]
        if chosen.weights is not None:
            columns.append(pa.array(chosen.weights[here], from_pandas=False))
        if chosen.copies is not None:
            columns.append(pa.array(chosen.copies[here]))
        if chosen.groups is not None:
            columns += _group_columns(chosen, chosen.groups, chosen.groups.codes[chosen.part][here])
        if not scored.all():
            columns = _with_quarantined(columns, scored, quarantined)
        yield [pa.array(np.arange(start, start + len(scored))), *columns]


def _group_columns(chosen: ShardSelection, groups: Groups, codes: npt.NDArray[np.int32]) -> list[pa.Array]:
    """Rows' groups by name and, of rules that cut, where theirs is cut: null where nothing of it is kept."""
    columns = [groups.names.take(pa.array(codes))]
    if chosen.whole.limits is not None:
        limits = chosen.whole.limits[codes]
        columns.append(pa.array(limits, mask=np.isnan(limits)))
    return columns


def _with_quarantined(
    columns: list[pa.Array], scored: npt.NDArray[np.bool_], quarantined: Iterator[Quarantined]
) -> list[pa.Array]:
    """The columns of scored rows at their places among the others, of which those have id, reason, and not kept."""
    there = pa.array(np.cumsum(scored) - 1, mask=~scored)
    id_, score, kept, reason, *others = (column.take(there) for column in columns)
    entries = list(islice(quarantined, len(scored) - len(columns[0])))
    lacks = pa.array(~scored)
    id_ = pc.replace_with_mask(id_, lacks, pa.array([entry.id for entry in entries], pa.string()))
    reasons = pa.array([f"quarantined: {entry.reason}" for entry in entries], pa.string())
    return [id_, score, kept.fill_null(False), pc.replace_with_mask(reason, lacks, reasons), *others]


class Ids:
    """A score table's ids, so many after so many."""

    def __init__(self, store: Store, path: str) -> None:
        self._where, self._batches = store.full(path), read_batches(store, path, ["id"])
        self._held: Any = pa.array([], pa.string())

    def take(self, count: int) -> pa.Array:
        """The next ``count`` ids."""
        parts, found = [self._held], len(self._held)
        while found < count:
            batch = next(self._batches, None)
            if batch is None:
                raise CorpusError(f"{self._where}: has changed while it was read")
            parts.append(batch.column(0))
            found += batch.num_rows
        held = parts[-1] if not len(self._held) and len(parts) == 2 else pa.concat_arrays(parts)
        self._held = held.slice(count)
        return held.slice(0, count)
