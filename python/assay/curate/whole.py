"""The scores of a whole corpus as one table, its shards after one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from assay.corpus.errors import CorpusError
from assay.corpus.layout import quarantine_path, table_path
from assay.corpus.quarantine import read_quarantine
from assay.corpus.scores_folder import Scored, Scores, State, open_scores
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.corpus.tables import ROW_AND_ID


@dataclass(frozen=True)
class WholeTable:
    """A corpus's scores.

    Attributes:
        table: ``row``, ``id`` and scores of every row that has any. ``row`` counts the rows of all shards, one shard
            after another in the order of their paths, as a loader that reads them in this order does.
        rows: of all shards, quarantined ones included.
    """

    table: pa.Table
    rows: int


def read_whole(scores_url: str, columns: Sequence[str] | None = None, corpus_path: str | None = None) -> WholeTable:
    """Read a scores folder into memory: ``columns`` of it, all of them without.

    Raises:
        CorpusError: there is no such score; the scores do not cover the corpus as it is now; or a shard could not be
            read, so that nobody knows how many rows lie before those of the next.
    """
    scores = open_scores(scores_url, corpus_path)
    shards = scored_shards(scores)
    if unreadable := scores.of(State.UNREADABLE):
        raise CorpusError(
            f"{scores.store.url}: {unreadable[0].shard.path} could not be read ({unreadable[0].detail}), so that rows "
            "cannot be counted over the shards; mend it or take it out of the corpus, and finish with `assay score`"
        )
    wanted = list(scores.columns if columns is None else columns)
    if unknown := [name for name in wanted if name not in scores.columns]:
        raise CorpusError(f"{scores.store.url}: has no score {unknown[0]!r}; it has {', '.join(scores.columns)}")
    tables: list[pa.Table] = []
    start = 0
    for shard, table in shards:
        with scores.store.open(table_path(shard)) as file:
            own = pq.read_table(file, columns=["row", "id", *wanted])
        rows = own["row"].to_numpy()
        check_rows(scores.store, shard, table, rows)
        tables.append(own.set_column(0, ROW_AND_ID[0], pa.array(rows + start)).replace_schema_metadata(None))
        start += table.rows
    return WholeTable(pa.concat_tables(tables), start)


def scored_shards(scores: Scores) -> list[tuple[Shard, Scored]]:
    """The score tables, if they cover every readable shard of the corpus; else a CorpusError with counts."""
    for state, advice in (
        (State.UNKNOWN, "could not be looked at; try again"),
        (State.MISSING, "have no score table; finish the run with `assay score`"),
        (State.CHANGED, "do not match their score table; score them again with `assay score`"),
    ):
        found = scores.of(state)
        if found:
            example = f"{found[0].shard.path}{': ' if found[0].detail else ''}{found[0].detail}"
            raise CorpusError(f"{len(found)} of {len(scores.shards)} shards {advice} ({example})")
    tables = [(status.shard, status.table) for status in scores.shards if status.table is not None]
    if not tables:
        raise CorpusError(f"{scores.store.url}: no shard could be scored, so there is nothing to select from")
    return tables


def check_rows(store: Store, shard: Shard, table: Scored, rows: npt.NDArray[np.int64]) -> None:
    """CorpusError unless a score table's rows and the quarantined ones are together the shard's."""
    check = RowCheck(store, shard, table)
    check.see(rows)
    check.end()


class RowCheck:
    """Checks the same of rows that come some at a time."""

    def __init__(self, store: Store, shard: Shard, table: Scored) -> None:
        self._store, self._shard, self._table = store, shard, table
        self._seen, self._last = 0, -1
        self._missing = quarantined_rows(store, shard, table)

    def see(self, rows: npt.NDArray[np.int64]) -> None:
        """The next rows of the table."""
        if not len(rows):
            return
        if rows[0] <= self._last or rows[-1] >= self._table.rows or (np.diff(rows) <= 0).any():
            raise self._error()
        self._seen, self._last = self._seen + len(rows), int(rows[-1])
        near = self._missing[slice(*np.searchsorted(self._missing, [rows[0], self._last + 1]))]
        if np.isin(near, rows, assume_unique=True).any():
            raise self._unlisted()

    def end(self) -> None:
        """There are no more."""
        if self._seen + len(self._missing) != self._table.rows:
            raise self._unlisted()

    def _error(self) -> CorpusError:
        where = self._store.full(table_path(self._shard))
        return CorpusError(f"{where}: its rows do not ascend below {self._table.rows}; score it again")

    def _unlisted(self) -> CorpusError:
        where = self._store.full(quarantine_path(self._shard))
        return CorpusError(f"{where}: not the list of the rows that {self._shard.path} lacks")


def quarantined_rows(store: Store, shard: Shard, table: Scored) -> npt.NDArray[np.int64]:
    """The rows of a shard that are in quarantine. CorpusError unless they ascend, within the shard."""
    if not table.quarantined:
        return np.empty(0, np.int64)
    listed = (-1 if entry.row is None else entry.row for entry in read_quarantine(store, shard))
    rows = np.fromiter(islice(listed, table.rows + 1), np.int64)
    if len(rows) and (rows[0] < 0 or rows[-1] >= table.rows or (np.diff(rows) <= 0).any()):
        raise CorpusError(f"{store.full(quarantine_path(shard))}: not the list of the rows that {shard.path} lacks")
    return rows


def place_of(missing: npt.NDArray[np.int64], row: int) -> int | None:
    """A row's place in its shard's table, given the rows in quarantine; None if it is one of those."""
    before = int(np.searchsorted(missing, row))
    return None if before < len(missing) and missing[before] == row else row - before
