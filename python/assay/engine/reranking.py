"""Retrieve, then re-rank: of a recipe with a shortlist the second pass, which scores the rows that the first chose.

The first pass is a run of its own, over every row, into a scores folder inside the output. Its tables are what the
second goes by, and what the tables of the whole are made from: each row's scores there, and behind them those of the
methods with a shortlist, NaN in the rows that these have not scored.
"""

from __future__ import annotations

import heapq
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.corpus.errors import CorpusError, ShardError
from assay.corpus.footer import Footer, RowCounts, Table, TableColumn, open_table
from assay.corpus.layout import table_path
from assay.corpus.named_files import changed_file, copy_files
from assay.corpus.quarantine import Quarantined, QuarantineWriter, read_quarantine
from assay.corpus.readers import shard_errors
from assay.corpus.score_files import ROW_GROUP_ROWS, ScoreWriter, opened_table, stream_score
from assay.corpus.scores_folder import read_manifest
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.corpus.tables import ROW_AND_ID, count_nan_rows, make_table, score_schema
from assay.engine.batches import empty_scores
from assay.engine.plan import Plan, find_corpora, is_of, make_plan
from assay.engine.shard import Scored, score_anew_or_stored, score_windows
from assay.engine.shortlist import Rows, Shortlist, ranking_column
from assay.engine.workshop import Workshop, open_workshop
from assay.methods import Column
from assay.recipe.methods import ShortlistSpec
from assay.recipe.recipe import Recipe
from assay.select.best import best
from assay.select.rules import amount_rows

Advance = Callable[[int, float], None]


def next_plan(recipe: Recipe, part: tuple[int, int] = (1, 1), rescore: bool = False, retry: bool = False) -> Plan:
    """What a run would do first: of a recipe with a shortlist the retrieval, until that is done."""
    corpora = find_corpora(recipe)
    if recipe.shortlist is None:
        return make_plan(recipe, part, rescore, corpora, retry)
    retrieval = make_plan(recipe.retrieval(), (1, 1), rescore, corpora, retry)
    if missing_shards(retrieval):
        return make_plan(recipe.retrieval(), part, rescore, corpora, retry)
    return make_plan(recipe, part, rescore, corpora, retry, make_shortlist(recipe.shortlist, retrieval))


def check_recipe(recipe: Recipe) -> list[Column]:
    """The columns of a recipe's tables. Its models are loaded and its methods made, each pass's after the other; errors
    as of ``open_workshop`` and ``ranking_column``."""
    corpora = find_corpora(recipe)
    if recipe.shortlist is None:
        return open_workshop(make_plan(recipe, rescore=True, corpora=corpora), fit=False).columns
    first = open_workshop(make_plan(recipe.retrieval(), rescore=True, corpora=corpora), fit=False).columns
    columns = [TableColumn(**vars(column)) for column in first]
    ranking_column(recipe.shortlist, columns)
    nothing = Shortlist(recipe.retrieval().output, recipe.shortlist, columns, {})
    whole = make_plan(recipe, rescore=True, corpora=corpora, shortlist=nothing)
    return open_workshop(whole, fit=False).columns


def missing_shards(retrieval: Plan) -> list[Shard]:
    """The shards that are still to be retrieved from: those that cannot be read are not among them."""
    return [shard for shard in retrieval.todo if unreadable(retrieval.output, shard) is None]


def unreadable(output: Store, shard: Shard) -> str | None:
    """Why a shard could not be read, if a run has found so."""
    entry = next(read_quarantine(output, shard), None)
    return entry.reason if entry is not None and entry.row is None else None


def make_shortlist(spec: ShortlistSpec, retrieval: Plan) -> Shortlist:
    """Choose rows by the tables of a finished retrieval. NaN is never chosen; of equals the earlier row is.

    Raises:
        RecipeError: as of ``ranking_column``.
        CorpusError: a table has other rows than its footer says.
    """
    output, columns = retrieval.output, read_manifest(retrieval.output).columns
    sign = -1 if ranking_column(spec, columns).keep == "low" else 1
    absent = set(retrieval.todo)
    shards = [shard for shard in retrieval.corpus.shards if shard not in absent]
    counts = [table.file.rows if table else 0 for table in output.map(partial(open_table, output), shards)]

    def keys() -> Iterator[npt.NDArray[np.float32]]:
        for shard in shards:
            for values in stream_score(output, table_path(shard), spec.by):
                yield sign * values

    total = sum(counts)
    chosen, start, rows = best(keys, total, amount_rows(spec.top, total)), 0, {}
    for shard, count in zip(shards, counts, strict=True):
        here = np.flatnonzero(chosen[start : start + count])
        start += count
        if len(here):
            rows[shard.path] = _rows_of(output, shard, count)[here]
    return Shortlist(output.url, spec, tuple(columns), rows)


def _rows_of(output: Store, shard: Shard, count: int) -> Rows:
    with opened_table(output, table_path(shard)) as table:
        batches = table.iter_batches(columns=["row"], batch_size=ROW_GROUP_ROWS)
        rows = np.concatenate([np.empty(0, np.int64), *(batch.column("row").to_numpy() for batch in batches)])
    if len(rows) != count:
        raise CorpusError(f"{output.full(table_path(shard))}: has changed while it was read")
    return rows


def score_unit(
    workshop: Workshop, shard: Shard, output: Store, on_progress: Advance, anew: bool = False
) -> tuple[Footer, bool]:
    """As ``score_anew_or_stored``; with a shortlist ``rerank_shard``."""
    if workshop.shortlist is None:
        return score_anew_or_stored(workshop, shard, output, on_progress, anew)
    return rerank_shard(workshop, workshop.shortlist, shard, output, on_progress), False


def rerank_shard(workshop: Workshop, shortlist: Shortlist, shard: Shard, output: Store, on_progress: Advance) -> Footer:
    """Score a shard's rows of the shortlist, and write its table: what chose them, and these scores.

    A shard that could not be read when it was retrieved from, or has changed since, is a ShardError.
    """
    assert workshop.scorer is not None
    first = _retrieved(shortlist.store, shard)
    scorer, found, rows = workshop.scorer.fresh(), list[Scored](), shortlist.of(shard)
    if len(rows):
        wanted = frozenset(rows.tolist())
        source = score_windows(workshop, scorer, shard, found.append, on_progress, wanted=wanted.__contains__)
        if source.fingerprint != first.footer.input.fingerprint:
            raise ShardError(_CHANGED)
    on_progress(0, 1.0)
    facts = {f"{method.name}.shortlist": str(shortlist.spec) for method in workshop.methods}
    with workshop.times.measure("write"):
        return _save(workshop, shortlist, shard, output, _Scores(found), first, {**scorer.metadata(), **facts})


_CHANGED = "has changed since it was retrieved from; run again when nobody writes to it"


def _retrieved(store: Store, shard: Shard) -> Table:
    table = open_table(store, shard)
    if table is None:
        raise ShardError(unreadable(store, shard) or f"has no table in {store.url}; run again")
    with shard_errors():
        same = is_of(table, shard) and not changed_file(store, shard, table.footer.input.files)
    if not same:
        raise ShardError(_CHANGED)
    return table


class _Scores:
    """What the second pass says of a shard's rows."""

    def __init__(self, windows: Sequence[Scored]) -> None:
        self.rejected = [bad for window in windows for bad in window.rejected]
        self._windows = windows
        self._rows = np.concatenate([np.empty(0, np.int64), *(window.rows for window in windows)]).astype(np.int64)
        self._lost = np.array([bad.row for bad in self.rejected], np.int64)

    def beside(self, batch: pa.RecordBatch, workshop: Workshop) -> pa.RecordBatch:
        """Rows of the first pass's table with the second's scores behind theirs; without those that it rejected."""
        batch = batch.filter(pa.array(~np.isin(batch.column("row").to_numpy(), self._lost)))
        rows, own = batch.column("row").to_numpy(), workshop.own_columns
        there = np.isin(self._rows, rows)
        places, scores = np.searchsorted(rows, self._rows[there]), empty_scores(own, len(rows))
        for name in scores:
            parts = [window.scores[name] for window in self._windows]
            if len(places):
                scores[name][places] = np.concatenate(parts)[there]
        made = make_table(rows, batch.column("id"), scores, own, {})
        arrays = [*batch.columns, *(made.column(i).combine_chunks() for i in range(len(ROW_AND_ID), made.num_columns))]
        return pa.RecordBatch.from_arrays(arrays, schema=score_schema(workshop.columns, {}))


def _save(
    workshop: Workshop,
    shortlist: Shortlist,
    shard: Shard,
    output: Store,
    scores: _Scores,
    first: Table,
    metadata: Mapping[str, str],
) -> Footer:
    """Write the table, the list of quarantined rows, and that of the files that rows name."""
    store, nan = shortlist.store, Counter[str]()
    with tempfile.TemporaryFile() as spool, tempfile.TemporaryFile() as list_spool:
        table, quarantine = ScoreWriter(workshop.columns, spool), QuarantineWriter(shard, list_spool)
        with opened_table(store, table_path(shard)) as file:
            for batch in file.iter_batches(batch_size=ROW_GROUP_ROWS):
                merged = scores.beside(batch, workshop)
                nan.update(
                    {name: count_nan_rows(merged.column(name)) for name in merged.schema.names[len(ROW_AND_ID) :]}
                )
                table.add_batch(merged)
        rejected = [Quarantined(shard.path, bad.row, bad.id, bad.reason) for bad in scores.rejected]
        for bad in heapq.merge(read_quarantine(store, shard), rejected, key=_row):
            quarantine.add(bad.row, bad.id, bad.reason)
        copy_files(store, output, shard, first.footer.input.files)
        listed, counts = quarantine.save(output), RowCounts(scored=table.rows, quarantined=quarantine.count)
        methods = {**first.footer.methods, **metadata}
        footer = Footer.make(workshop.identity, first.footer.input, counts, listed, nan, methods)
        table.save(output, table_path(shard), footer.to_json())
    return footer


def _row(entry: Any) -> int:
    return int(entry.row)
