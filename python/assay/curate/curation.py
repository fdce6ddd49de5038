"""Selecting over a whole scores folder, and writing the curated corpus."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from assay._version import __version__
from assay.corpus.claim import CLAIM, claim
from assay.corpus.copying import copy_rows, copy_sidecars
from assay.corpus.errors import CorpusError, ShardError
from assay.corpus.layout import MANIFEST, quarantine_path, selection_path, table_path
from assay.corpus.listing import summarise_left_out
from assay.corpus.quarantine import read_quarantine
from assay.corpus.score_files import read_score, score_field, stream_ids
from assay.corpus.scores_folder import Scored, Scores, State, open_scores
from assay.corpus.shards import Shard, find_shards, refuse_overlap
from assay.corpus.storage import TEMPORARY_SUFFIX, Store
from assay.corpus.tables import ROW_AND_ID
from assay.curate.ranking import score_name
from assay.curate.rules import Rule
from assay.select import Selection

log = logging.getLogger("assay")

SELECTION = "a selection"

_ROW_GROUP_ROWS = 1 << 16


@dataclass(frozen=True)
class ShardCounts:
    """What became of one shard's rows."""

    path: str
    table: str
    table_sha256: str
    rows: int
    kept: int
    dropped: int
    quarantined: int


@dataclass(frozen=True)
class Curated:
    """What a selection kept of a corpus."""

    selection: Selection
    shards: tuple[ShardCounts, ...]
    unreadable: dict[str, str]
    left_out: dict[str, str]

    @property
    def missing(self) -> str:
        """What of the corpus no rule could have kept, in one line; empty if nothing."""
        parts = [f"{len(self.unreadable)} unreadable shards are not in it"] if self.unreadable else []
        parts += [summarise_left_out(self.left_out)] if self.left_out else []
        parts += ["no row has scores: all are in quarantine"] if self.rows and self.rows == self.quarantined else []
        return "; ".join(parts)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def kept(self) -> int:
        return sum(shard.kept for shard in self.shards)

    @property
    def quarantined(self) -> int:
        return sum(shard.quarantined for shard in self.shards)


def curate(scores_url: str, by: str | None, rule: Rule, output_url: str, corpus_path: str | None = None) -> Curated:
    """Choose rows by one score over all shards and write them, in their own format, under ``output_url``.

    ``rule`` gets a table with the one score, all shards after one another, and returns a `Selection`. Beside
    the shards go a manifest and, per shard, a table of every input row with its score, fate and reason.
    Scores that do not cover the corpus as it is now are an CorpusError, before anything is written.
    """
    scores = open_scores(scores_url, corpus_path)
    name = score_name(scores, by)
    tables = _complete(scores)
    output = Store.at(output_url)
    _refuse_inputs(output, scores, [shard for shard, _ in tables])
    selection, shards = _select(scores, tables, name, rule)
    with claim(output, SELECTION):
        for path in output.sweep():
            log.info("removed %s, left by a selection that was killed", path)
        output.remove(MANIFEST)  # it comes back when everything that it speaks of is there
        counts = tuple(_write_shard(scores.store, chosen, name, output) for chosen in shards)
        copy_sidecars(scores.corpus, output, selection.rule)
        unreadable = {status.shard.path: status.detail for status in scores.of(State.UNREADABLE)}
        left_out = {entry.path: entry.reason for entry in scores.corpus.left_out}
        curated = Curated(selection, counts, unreadable, left_out)
        output.write_text(MANIFEST, json.dumps(_manifest(scores, name, curated), indent=2, ensure_ascii=False) + "\n")
    return curated


def _select(
    scores: Scores, tables: Sequence[tuple[Shard, Scored]], name: str, rule: Rule
) -> tuple[Selection, list[_ShardSelection]]:
    """What the rule makes of all scores together, and of each shard's."""
    rows, values = _read(scores.store, tables, name)
    field = score_field(scores.store, table_path(tables[0][0]), name)
    if field.type != pa.float32():
        raise CorpusError(f"--by {name}: holds {field.type} per row; expected one number to judge by")
    selection = rule(pa.Table.from_arrays([pa.array(np.concatenate(values))], schema=pa.schema([field])))
    legend = np.array(selection.legend, object)
    shards, start = [], 0
    for (shard, table), own_rows, own_scores in zip(tables, rows, values, strict=True):
        part = slice(start, start := start + len(own_rows))
        weights = None if selection.weights is None else selection.weights[part]
        reasons = legend[selection.codes[part]]
        shards.append(_ShardSelection(shard, table, own_rows, own_scores, selection.mask[part], reasons, weights))
    return selection, shards


def _refuse_inputs(output: Store, scores: Scores, shards: Sequence[Shard]) -> None:
    """CorpusError if what is written would fall on the corpus, the scores or somebody's files."""
    refuse_overlap(output, scores.corpus_path, scores.corpus)
    if output.holds(scores.store) or scores.store.holds(output):
        raise CorpusError(f"{output.url}: the output and the scores {scores.store.url} must not lie in each other")
    ours = {path for shard in shards for path in (*shard.files(), selection_path(shard))}
    output.refuse_detours(ours)
    for path in scores.inputs:
        try:
            found = find_shards(path)
        except (CorpusError, OSError):  # it is gone: nothing to write over
            continue
        refuse_overlap(output, path, found)
    # A folder with other files would become a mixture of two corpora; and files of these names may be another corpus.
    ours |= {MANIFEST, CLAIM, *scores.corpus.sidecars}
    there = [path for path in output.files() if not path.endswith(TEMPORARY_SUFFIX)]
    strangers = [path for path in there if path not in ours and not any(_is_own(shard, path) for shard in shards)]
    if strangers:
        raise CorpusError(
            f"{output.url}: holds {len(strangers)} files that this selection would not write "
            f"({strangers[0]}); choose an empty folder"
        )
    if there and not _is_selection(output):
        raise CorpusError(f"{output.url}: holds {there[0]}, which no selection wrote; choose an empty folder")


def _is_own(shard: Shard, path: str) -> bool:
    """Whether a file lies in a shard that is a folder, under a name of those that its format makes up."""
    pattern, folder = shard.format.own_files, f"{shard.path}/"
    return pattern is not None and path.startswith(folder) and pattern.fullmatch(path[len(folder) :]) is not None


def _is_selection(output: Store) -> bool:
    """Whether what is there was written by a selection, be it one that was killed."""
    try:
        if output.exists(CLAIM):
            return output.read_text(CLAIM) == SELECTION
        manifest = json.loads(output.read_text(MANIFEST))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"rule", "by", "scores"} <= manifest.keys()


def _complete(scores: Scores) -> list[tuple[Shard, Scored]]:
    """The score tables, if they cover every readable shard of the corpus."""
    for state, advice in (
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


def _read(
    store: Store, tables: Sequence[tuple[Shard, Scored]], name: str
) -> tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.float32]]]:
    rows, values = [], []
    for shard, table in tables:
        own_rows, own_values = read_score(store, table_path(shard), name)
        total = table.rows
        if (np.diff(np.concatenate([[-1], own_rows, [total]])) <= 0).any():
            raise CorpusError(f"{store.full(table_path(shard))}: its rows do not ascend below {total}; score it again")
        rows.append(own_rows)
        values.append(own_values)
        listed = [entry.row for entry in read_quarantine(store, shard)] if table.quarantined else []
        if listed != np.setdiff1d(np.arange(total), own_rows, assume_unique=True).tolist():
            raise CorpusError(f"{store.full(quarantine_path(shard))}: not the list of the rows that {shard.path} lacks")
    return rows, values


@dataclass(frozen=True)
class _ShardSelection:
    """One shard's scored rows, and what the selection over all shards makes of them."""

    shard: Shard
    table: Scored
    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    kept: npt.NDArray[np.bool_]
    reasons: npt.NDArray[np.object_]
    weights: npt.NDArray[np.float64] | None

    @property
    def total(self) -> int:
        """The shard's physical rows."""
        return self.table.rows

    def keep(self) -> npt.NDArray[np.bool_]:
        """One Boolean per physical row; quarantined rows are not kept."""
        keep = np.zeros(self.total, bool)
        keep[self.rows] = self.kept
        return keep


def _write_shard(store: Store, chosen: _ShardSelection, name: str, output: Store) -> ShardCounts:
    shard, counts = chosen.shard, chosen.table
    try:
        copy_rows(shard, chosen.keep(), output)
        if chosen.table.input != shard.fingerprint():
            raise ShardError("has changed meanwhile")
    except ShardError as error:
        raise CorpusError(f"{shard.path}: cannot be copied: {error}") from error
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
        output.write(selection_path(shard)) as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for columns in _selection_columns(store, chosen):
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    kept = int(chosen.kept.sum())
    digest = store.sha256(table_path(shard))
    return ShardCounts(
        shard.path, table_path(shard), digest, chosen.total, kept, counts.scored - kept, counts.quarantined
    )


def _selection_columns(store: Store, chosen: _ShardSelection) -> Iterator[list[pa.Array]]:
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


def _manifest(scores: Scores, name: str, curated: Curated) -> dict[str, Any]:
    selection = curated.selection
    return {
        "format": 1,
        "version": __version__,
        "rule": selection.rule,
        "by": name,
        "threshold": selection.threshold,
        "facts": dict(selection.facts),
        "scores": scores.store.url,
        "corpus": scores.corpus.store.url,
        "recipe": scores.identity.recipe,
        "models": scores.identity.models,
        "rows": {"in": curated.rows, "kept": curated.kept, "quarantined": curated.quarantined},
        "unreadable": curated.unreadable,
        "left_out": curated.left_out,
        "shards": [vars(shard) for shard in curated.shards],
    }
