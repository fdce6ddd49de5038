"""Labels of a sample of the corpus, by which a score is cut."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from assay import select
from assay.corpus.errors import CorpusError
from assay.corpus.layout import table_path
from assay.corpus.quarantine import read_quarantine
from assay.corpus.scores_folder import Scored
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.curate.dataset import SHARD
from assay.curate.rows import read_batches
from assay.curate.whole import place_of, quarantined_rows
from assay.select import Cut, GroupCuts, Selection
from assay.select.groups import Groups

Rule = Callable[[pa.Table], Selection]
Key = str | tuple[str, int]
"""An id, or a shard's path and a row in it."""

MOST_LABELS = 200_000
_KEEP = {"1": True, "true": True, "yes": True, "keep": True, "good": True}
_LABELS = _KEEP | {"0": False, "false": False, "no": False, "drop": False, "bad": False}


@dataclass(frozen=True)
class Labels:
    """Rows of a corpus that somebody has looked at: by what they are named, whether each is worth keeping."""

    url: str
    sha256: str
    labels: Mapping[Key, bool]
    lines: Mapping[Key, int]

    def error(self, key: Key, message: str) -> CorpusError:
        """The label that is meant, and what is the matter with it."""
        return CorpusError(f"--audit {self.url}: line {self.lines[key]}: {_shown(key)}: {message}")


def _shown(key: Key) -> str:
    return f"id {key[:80]!r}" if isinstance(key, str) else f"{key[0][:200]}:{key[1]}"


@dataclass(frozen=True)
class Audit:
    """The rule that cuts score ``by`` where F_β is greatest on labelled rows, see `select.fbeta_cut`; with ``group``,
    the column of the rule's table that has the groups, in each of them."""

    labels: Labels
    by: str
    beta: float = 1.0
    seed: int = 0
    keep: Literal["high", "low"] | None = None
    weighed: Callable[[Rule], Rule] = lambda rule: rule
    group: str | None = None

    def bind(
        self,
        store: Store,
        tables: Sequence[tuple[Shard, Scored]],
        scored: pa.Table,
        passes: npt.NDArray[np.bool_] | None,
        groups: Groups | None = None,
    ) -> tuple[Cut | GroupCuts, Rule]:
        """The cut, or that of each group, and the rule that makes it.

        Args:
            store, tables: the score tables.
            scored: the scores of all their rows, shards after one another.
            passes: the rows among which the rule will choose, if not all: no cut keeps another.
            groups: of all scored rows. A labelled row in quarantine is of none: it counts in the cut of all together.
        """
        places = np.array(list(find_labelled(store, tables, self.labels)), np.int64)
        there = places >= 0
        if passes is not None:
            there[there] = passes[places[there]]
        values = np.full(len(places), np.nan, np.float32)
        values[there] = scored[self.by].take(pa.array(places[there])).to_numpy()
        sample = pa.Table.from_arrays([pa.array(values, from_pandas=False)], schema=scored.select([self.by]).schema)
        good = np.array(list(self.labels.labels.values()))
        options = (self.beta, self.seed, self.keep)
        try:
            if self.group is None or groups is None:
                cut: Cut | GroupCuts = select.fbeta_cut(sample, self.by, good, *options)
            else:
                cut = self._of_groups(sample, good, places, groups)
        except ValueError as error:
            raise CorpusError(f"--audit {self.labels.url}: {error}") from error

        def rule(table: pa.Table) -> Selection:
            if isinstance(cut, GroupCuts):
                return select.cut_groups(table, self.by, cut, self.group or "", self.keep)
            chosen = select.threshold(table, self.by, cut.threshold, self.keep)
            told = f"{self.by}, cut at {cut.threshold:.6g} by F{self.beta:g} of {cut.rows:,} labels"
            return replace(chosen, rule=told)

        return cut, self.weighed(rule)

    def _of_groups(
        self, sample: pa.Table, good: npt.NDArray[np.bool_], places: npt.NDArray[np.int64], groups: Groups
    ) -> GroupCuts:
        """The groups' cuts by the rows that have one, beside that of all."""
        options = (self.beta, self.seed, self.keep)
        pooled, there = select.fbeta_cut(sample, self.by, good, *options), np.flatnonzero(places >= 0)
        names = groups.names.take(pa.array(groups.codes[places[there]])).to_pylist()
        return select.fbeta_cuts(sample.take(pa.array(there)), self.by, good[there], names, *options, pooled=pooled)

    def to_json(self, cut: Cut | GroupCuts) -> dict[str, Any]:
        """For the manifest: the labels, and the cuts that they make."""
        return {"labels": self.labels.url, "labels_sha256": self.labels.sha256, **cut.to_json()}


def read_labels(url: str) -> Labels:
    """Read a CSV file with the columns `label` (1 or 0, keep or drop, …) and `id`, or `shard` and `row`.

    CorpusError, with the line, for anything else, and for a row that is labelled twice.
    """
    store = Store.at(url)
    try:
        text, digest = store.read_text(""), store.sha256("")
        entries = list(_entries(text.removeprefix("\ufeff")))
    except (OSError, ValueError, csv.Error) as error:
        raise CorpusError(f"--audit {url}: {error}") from error
    labels: dict[Key, bool] = {}
    lines: dict[Key, int] = {}
    for line, key, label in entries:
        if key in labels:
            raise CorpusError(f"--audit {url}: line {line}: {_shown(key)} has a label in line {lines[key]} already")
        labels[key], lines[key] = label, line
    if not labels:
        raise CorpusError(f"--audit {url}: has no labels")
    return Labels(url, digest, labels, lines)


def _entries(text: str) -> Iterator[tuple[int, Key, bool]]:
    """Line, key and label of every line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = [name.strip() for name in next(reader, [])]
    by_row = {SHARD, "row"} <= set(header)
    if "label" not in header or not (by_row or "id" in header) or len(set(header)) < len(header):
        raise ValueError(f"has the columns {', '.join(header) or 'none'}; expected label and id, or label, shard, row")
    for cells in reader:
        line = reader.line_num
        if not cells:
            continue
        if len(cells) != len(header):
            raise ValueError(f"line {line}: has {len(cells)} cells; expected {len(header)}, as the first line has")
        own = dict(zip(header, cells, strict=True))
        label = _LABELS.get(own["label"].strip().lower())
        if label is None:
            raise ValueError(f"line {line}: label {own['label']!r}: expected one of {', '.join(_LABELS)}")
        row = own.get("row", "").strip()
        if by_row and not (row.isascii() and row.isdecimal() and len(row) <= 18):
            raise ValueError(f"line {line}: row {own['row']!r}: expected a number from 0 on")
        if line > MOST_LABELS:
            raise ValueError(f"has more than {MOST_LABELS:,} lines; label a sample")
        yield line, ((own[SHARD], int(row)) if by_row else own["id"]), label


def find_labelled(store: Store, tables: Sequence[tuple[Shard, Scored]], labels: Labels) -> Iterator[int]:
    """Of each label the place of its row among all scored rows, shards after one another; -1 of one in quarantine.

    CorpusError for a label that no row has, or several have.
    """
    if all(isinstance(key, tuple) for key in labels.labels):
        return _by_row(store, tables, labels)
    return _by_id(store, tables, labels)


def _by_row(store: Store, tables: Sequence[tuple[Shard, Scored]], labels: Labels) -> Iterator[int]:
    start, shards = 0, {}
    for shard, table in tables:
        shards[shard.path] = start, shard, table
        start += table.scored
    missing: dict[str, npt.NDArray[np.int64]] = {}
    for key in labels.labels:
        path, row = str(key[0]), int(key[1])
        if path not in shards:
            raise labels.error(key, f"no such shard has scores; expected a path as {tables[0][0].path}")
        start, shard, table = shards[path]
        if row >= table.rows:
            raise labels.error(key, f"the shard has {table.rows:,} rows, counted from 0")
        if path not in missing:
            missing[path] = quarantined_rows(store, shard, table)
        place = place_of(missing[path], row)
        yield -1 if place is None else start + place


def _by_id(store: Store, tables: Sequence[tuple[Shard, Scored]], labels: Labels) -> Iterator[int]:
    wanted = [str(key) for key in labels.labels]
    values = pa.array(wanted, pa.string())
    found = np.full(len(wanted), -2, np.int64)

    def see(indices: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> None:
        there, counts = np.unique(indices, return_counts=True)
        if (twice := there[(counts > 1) | (found[there] != -2)]).size:
            raise labels.error(wanted[twice[0]], "is the id of several rows; label them by shard and row")
        found[indices] = places

    start = 0
    for shard, _ in tables:
        for batch in read_batches(store, table_path(shard), ["id"]):
            indices = pc.index_in(batch.column("id"), value_set=values)
            places = np.flatnonzero(indices.is_valid().to_numpy(zero_copy_only=False))
            see(indices.drop_null().to_numpy().astype(np.int64), start + places)
            start += batch.num_rows
    order = {id_: i for i, id_ in enumerate(wanted)}
    for shard, table in tables:
        for entry in read_quarantine(store, shard) if table.quarantined else ():
            if entry.id in order:
                see(np.array([order[entry.id]]), np.array([-1]))
    if (lost := np.flatnonzero(found == -2)).size:
        raise labels.error(wanted[lost[0]], f"no row has it; {len(lost):,} of {len(wanted):,} labels match no row")
    return iter(found.tolist())
