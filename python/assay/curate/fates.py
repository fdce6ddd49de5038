"""What a selection made of some rows, read from the folder that it wrote."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from assay.corpus.errors import CorpusError
from assay.corpus.layout import selection_path, table_path
from assay.corpus.scores_folder import Scores
from assay.corpus.storage import Store
from assay.curate.chosen import score_column
from assay.curate.condition import Compared
from assay.curate.manifests import SelectionManifest, read_selection
from assay.curate.rows import Rows, Tables, open_beside
from assay.curate.where import parse_condition, trace
from assay.curate.whole import place_of, quarantined_rows, scored_shards

# Of rows that the rule was never asked about.
_BEFORE_THE_RULE = ("dropped: not: ", "dropped: has no value: ")


@dataclass(frozen=True)
class Fate:
    """What a selection made of a row.

    Attributes:
        by, score: what it was judged by, and the row's; None of a row in quarantine.
        threshold: where the score was cut, of its group if the rule looks at groups, if the rule cuts and the row was
            put to it.
        facts: the numbers that the rule or the condition took from all rows.
        column, group: of a rule that looks at groups, the column and the row's value, None for null.
        copies: of a mix, how often the row is in the output.
        where: what each comparison of the condition says of the row, if there was one.
        untold: why that cannot be told.
    """

    rule: str
    kept: bool
    reason: str
    by: str
    score: float | None
    threshold: float | None
    weight: float | None
    facts: dict[str, float]
    column: str | None = None
    group: str | None = None
    copies: int | None = None
    where: tuple[Compared, ...] = ()
    untold: str | None = None

    @property
    def distance(self) -> float | None:
        """How far above the threshold the score is; below it, negative."""
        if self.threshold is None or self.score is None or math.isnan(self.score):
            return None
        return 0.0 if self.score == self.threshold else self.score - self.threshold  # infinite ones, too


def find_fates(scores: Scores, selection_url: str, rows: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Fate]:
    """By shard and row, what a selection made of them; rows of shards that are not in it are left out.

    CorpusError if this is no selection, or not one of these scores as they are now.
    """
    store = Store.at(selection_url)
    manifest = read_selection(store, f"--selection {store.url}")
    listed = {shard.path: shard.table_sha256 for shard in manifest.shards}
    shards = {status.shard.path: status.shard for status in scores.shards}
    found: dict[tuple[str, int], Fate] = {}
    for path in {path for path, _ in rows if path in listed}:
        if scores.store.sha256(table_path(shards[path])) != listed[path]:
            raise CorpusError(
                f"--selection {store.url}: made of other scores of {path} than {scores.store.url} has; select again"
            )
        wanted = [row for its, row in rows if its == path]
        for entry in _entries(store, selection_path(shards[path]), wanted):
            found[path, entry["row"]] = _fate(manifest, entry)
    return found if manifest.where is None else _with_comparisons(scores, manifest, manifest.where.condition, found)


def _with_comparisons(
    scores: Scores, manifest: SelectionManifest, text: str, fates: Mapping[tuple[str, int], Fate]
) -> dict[tuple[str, int], Fate]:
    """The fates with what each comparison of the condition says of the rows, from the scores as they are now."""
    try:
        tables = scored_shards(scores)
        others = {name: other.scores or other.selection or "" for name, other in manifest.beside.items()}
        beside = open_beside(scores, tables, others)
        rows = Rows(scores.store, tables, beside)
        places = _places(scores.store, tables, fates)
        if not places:  # all in quarantine
            return dict(fates)
        _check_tables(rows, manifest)
        found = trace(rows, parse_condition(text, rows.names()), list(places.values()))
    except (CorpusError, ImportError) as error:
        return {key: replace(fate, untold=str(error).split("\n")[0]) for key, fate in fates.items()}
    return {key: replace(fate, where=found.get(places.get(key, -1), ())) for key, fate in fates.items()}


def _check_tables(rows: Rows, manifest: SelectionManifest) -> None:
    """CorpusError unless every table that the condition reads is the one that it read then: what it says of a row may
    depend on all others, and on what another run says of it."""
    if {shard.path: rows.store.sha256(table_path(shard)) for shard, _ in rows.tables} != {
        shard.path: shard.table_sha256 for shard in manifest.shards
    }:
        raise CorpusError("other shards have other scores than they had then; select again")
    for name, other in rows.beside.items():
        if other.digests(rows.tables) != manifest.beside[name].table_sha256:
            raise CorpusError(f"{name} ({other.store.url}) has other tables than it had then; select again")


def _places(store: Store, tables: Tables, keys: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Of each row that has scores, its place among those of all shards."""
    wanted: dict[str, list[int]] = {}
    for path, row in keys:
        wanted.setdefault(path, []).append(row)
    places, start = {}, 0
    for shard, table in tables:
        if shard.path in wanted:
            missing = quarantined_rows(store, shard, table)
            for row in wanted[shard.path]:
                if (place := place_of(missing, row)) is not None:
                    places[shard.path, row] = start + place
        start += table.scored
    return places


def _entries(store: Store, path: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    try:
        with store.open(path) as file:  # of its row groups only those that may hold them are read
            found = pq.read_table(file, filters=[("row", "in", list(rows))])
        if not {"row", "kept", "reason"} <= set(found.schema.names):
            raise ValueError("it does not say what was kept")
        return list(found.to_pylist())
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorpusError(f"--selection {store.full(path)}: cannot be read ({error})") from error


def _fate(manifest: SelectionManifest, entry: dict[str, Any]) -> Fate:
    reason, score = str(entry["reason"]), entry.get(score_column(manifest.by))
    judged = not reason.startswith(_BEFORE_THE_RULE) and not reason.endswith(" is NaN")
    threshold = (entry.get("threshold") if manifest.group else manifest.threshold) if judged else None
    weight, kept = entry.get("weight"), bool(entry["kept"])
    column = None if manifest.group is None or score is None else manifest.group.column
    its = (column, entry.get("group"), entry.get("copies"))
    return Fate(manifest.rule, kept, reason, manifest.by, score, threshold, weight, manifest.facts, *its)
