"""One sample: every score that it has, where it stands by each among all, and what a selection made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from assay.corpus.errors import CorpusError
from assay.corpus.layout import table_path
from assay.corpus.quarantine import read_quarantine, row_id
from assay.corpus.score_files import rows_at, table_schema
from assay.corpus.scores_folder import Scores, State
from assay.corpus.shards import Shard
from assay.curate.fates import Fate, find_fates
from assay.curate.rows import read_batches

_MOST = 10_000


@dataclass(frozen=True)
class Standing:
    """A score of a sample.

    Attributes:
        keep: the end that is better: high, low, or none.
        percentile: from 0 to 100, the share of the other rows with a number whose score is smaller; None of NaN, and
            where there are no others.
    """

    name: str
    value: float
    keep: str
    description: str
    percentile: float | None


@dataclass(frozen=True)
class Explained:
    """A sample: its scores, or why it has none, and what a selection made of it."""

    shard: str
    row: int
    id: str | None
    scores: tuple[Standing, ...]
    quarantined: str | None = None
    fate: Fate | None = None


@dataclass(frozen=True)
class Explanation:
    """All samples of one id, in the corpus's order.

    Attributes:
        rows: that have scores.
        left_out: shards of the corpus that were not looked at, and why.
    """

    samples: tuple[Explained, ...]
    rows: int
    left_out: Mapping[str, str]


def explain(scores: Scores, sample_id: str, selection_url: str | None = None) -> Explanation:
    """Look an id up, or `<shard>:<row>`, among the scored rows and those in quarantine.

    Tables are read twice, a row group's worth at a time: for the id, and to compare with all rows. Shards whose table
    is missing, or is not about the shard as it is now, are left out and named.

    Raises:
        CorpusError: nothing has this id, or more than 10,000 rows have; or the selection is not one of these scores.
    """
    shards = [status.shard for status in scores.of(State.DONE)]
    left_out = {s.shard.path: s.detail or s.state.value for s in scores.shards if s.state is not State.DONE}
    found = list(_find(scores, shards, sample_id))
    refused = list(islice(_find_quarantined(scores, sample_id), _MOST))
    if not found and not refused:
        some = "".join(f"; {path} was not looked at: {why}" for path, why in list(left_out.items())[:1])
        raise CorpusError(f"{sample_id}: {scores.store.url} has no sample of this id, nor a row <shard>:<row>{some}")
    standings, rows = _standings(scores, shards, found)
    samples = [
        Explained(shard.path, row, own, scored) for (shard, _, row, own), scored in zip(found, standings, strict=True)
    ]
    samples += refused
    if selection_url is not None:
        fates = find_fates(scores, selection_url, [(sample.shard, sample.row) for sample in samples])
        samples = [replace(sample, fate=fates.get((sample.shard, sample.row))) for sample in samples]
    samples.sort(key=lambda sample: (sample.shard, sample.row))
    return Explanation(tuple(samples), rows, left_out)


def _find(scores: Scores, shards: Sequence[Shard], sample_id: str) -> Iterator[tuple[Shard, int, int, str]]:
    """Shard, place in its table, row and id of every scored row that is meant."""
    count = 0
    for shard in shards:
        place, wanted = 0, _row_of(shard, sample_id)
        for batch in read_batches(scores.store, table_path(shard), ["row", "id"]):
            same = pc.equal(batch.column("id"), sample_id)
            if wanted is not None:
                same = pc.or_(same, pc.equal(batch.column("row"), wanted))
            for index in np.flatnonzero(same.to_numpy(zero_copy_only=False)).tolist():
                count += 1
                if count > _MOST:
                    raise CorpusError(
                        f"{sample_id}: more than {_MOST:,} rows have this id; ask for one as <shard>:<row>"
                    )
                yield shard, place + index, batch.column("row")[index].as_py(), batch.column("id")[index].as_py()
            place += batch.num_rows


def _find_quarantined(scores: Scores, sample_id: str) -> Iterator[Explained]:
    for status in scores.of(State.DONE):
        shard = status.shard
        if status.table is None or not status.table.quarantined:
            continue
        wanted = _row_of(shard, sample_id)
        for entry in read_quarantine(scores.store, shard):
            if entry.row is not None and (entry.id == sample_id or entry.row == wanted):
                yield Explained(shard.path, entry.row, entry.id, (), quarantined=entry.reason)


def _row_of(shard: Shard, sample_id: str) -> int | None:
    """The row that ``<shard>:<row>`` means, if it is one of this shard."""
    path, _, row = sample_id.rpartition(":")
    if path != shard.path or not row.isdecimal() or len(row) > 18:  # an int64's digits
        return None
    return int(row) if row_id(path, int(row)) == sample_id else None


def _standings(
    scores: Scores, shards: Sequence[Shard], found: Sequence[tuple[Shard, int, int, str]]
) -> tuple[list[tuple[Standing, ...]], int]:
    """Of each row, its scores; and how many rows there are."""
    if not found:
        return [], sum(status.table.scored for status in scores.of(State.DONE) if status.table)
    places: dict[Shard, list[int]] = {}
    for shard, place, *_ in found:
        places.setdefault(shard, []).append(place)
    held = [entry for shard, its in places.items() for entry in rows_at(scores.store, table_path(shard), its)]
    fields = [f for f in table_schema(scores.store, table_path(shards[0])) if f.type == pa.float32()]
    own = {f.name: np.array([entry[f.name] for entry in held], np.float32) for f in fields}
    counters = {name: _Counter(values) for name, values in own.items()}
    rows = 0
    for shard in shards:
        for batch in read_batches(scores.store, table_path(shard), list(own)):
            for name, counter in counters.items():
                counter.see(batch.column(name).to_numpy(zero_copy_only=False))
            rows += batch.num_rows
    shares = {name: counter.percentiles() for name, counter in counters.items()}
    return [
        tuple(_standing(field, float(own[field.name][i]), shares[field.name][i]) for field in fields)
        for i in range(len(found))
    ], rows


def _standing(field: pa.Field, value: float, percentile: float) -> Standing:
    said = {key.decode(): text.decode("utf-8", "replace") for key, text in (field.metadata or {}).items()}
    share = None if np.isnan(percentile) else percentile
    return Standing(field.name, value, said.get("keep", "none"), said.get("description", ""), share)


class _Counter:
    """Counts of all rows how many are below each of some values."""

    def __init__(self, values: npt.NDArray[np.float32]) -> None:
        self._values = values
        self._limits = np.unique(values[~np.isnan(values)])
        self._between = np.zeros(len(self._limits) + 1, np.int64)

    def see(self, values: npt.NDArray[np.float32]) -> None:
        places = np.searchsorted(self._limits, values[~np.isnan(values)], side="right")
        self._between += np.bincount(places, minlength=len(self._between))

    def percentiles(self) -> npt.NDArray[np.float64]:
        """Of each value 100 · (rows below it) / (rows − 1), NaN counted in neither; NaN where that says nothing."""
        total, found = int(self._between.sum()), np.full(len(self._values), np.nan)
        there = ~np.isnan(self._values)
        if total > 1:
            below = np.cumsum(self._between)
            found[there] = 100.0 * below[np.searchsorted(self._limits, self._values[there])] / (total - 1)
        return found
