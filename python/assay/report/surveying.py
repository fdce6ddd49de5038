"""The scores of a folder in numbers: exact counts and order statistics, in memory that does not follow the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.corpus.errors import CorpusError
from assay.corpus.layout import table_path
from assay.corpus.score_files import ROW_GROUP_ROWS, opened_table
from assay.corpus.scores_folder import Scores, ShardStatus, State

Floats = npt.NDArray[np.float32]

SAMPLE_ROWS = 20_000
MOST_SCORES = 24
SHARES = tuple(tenth / 10 for tenth in range(1, 10))
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_BINS = 48
_MOST_WHOLE_NUMBERS = 60
_HALF = 1 << 16


@dataclass(frozen=True)
class Column:
    """A score of one number per row: its name, the end to keep (high, low or none), and what it means."""

    name: str
    keep: str
    description: str


@dataclass(frozen=True)
class Cut:
    """What the best ``share`` of all rows is: as many ``rows``, from ``threshold`` on; None if no row has so many.

    ``at_threshold``: how many rows have this score or a better one, of which equal ones may make more.
    """

    share: float
    rows: int
    threshold: float | None
    at_threshold: int


@dataclass(frozen=True)
class Distribution:
    """How a score is distributed over all rows.

    Attributes:
        quantiles: by share of the rows with a number, the greatest score that is no greater than it; empty without any.
        edges, counts: of the histogram's B bins, (B + 1,) and (B,); the last bin holds its upper edge.
        below, above: rows outside of them.
        logarithmic: whether the bins are evenly wide in the logarithm.
    """

    column: Column
    rows: int
    nan: int
    minimum: float
    maximum: float
    quantiles: Mapping[float, float]
    cuts: Sequence[Cut]
    edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    below: int
    above: int
    logarithmic: bool = False

    @property
    def numbers(self) -> int:
        """Rows whose score is one."""
        return self.rows - self.nan

    @property
    def whole(self) -> bool:
        """Whether each bin is around a whole number."""
        return not self.logarithmic and bool((self.edges % 1 == 0.5).all())


@dataclass(frozen=True)
class Sample:
    """Rows drawn uniformly without replacement: their places over all tables, ascending, and by name their scores."""

    places: npt.NDArray[np.int64]
    scores: Mapping[str, Floats]


@dataclass(frozen=True)
class Survey:
    """What is to be said of all rows that have scores. ``wide``: columns that are not one number per row; ``skipped``:
    scores that were not looked at, for there are too many or others were asked for."""

    rows: int
    distributions: Sequence[Distribution]
    sample: Sample
    wide: Sequence[str]
    skipped: Sequence[str] = ()


def survey(scores: Scores, seed: int = 0, only: Sequence[str] = ()) -> Survey:
    """Read the tables of the shards that are done, twice, a row group's worth at a time.

    ``only``: these scores; without it all, but no more than the first MOST_SCORES.

    Raises:
        CorpusError: there is no such score, or too many are asked for; no shard is done; a table changes meanwhile, or
            holds an infinite score, which no run writes.
    """
    done = scores.of(State.DONE)
    if not done:
        raise CorpusError(f"{scores.store.url}: no shard of {scores.corpus_path} is scored as it is now")
    found, wide = _columns(scores, done[0])
    columns = _chosen(scores, found, wide, only)
    names = [column.name for column in columns]
    total = sum(status.table.scored for status in done if status.table)
    drawn = np.random.default_rng(seed).choice(total, min(total, SAMPLE_ROWS), replace=False, shuffle=False)
    places = np.sort(drawn).astype(np.int64)
    counters = {name: _Counter() for name in names}
    sampled: dict[str, list[Floats]] = {name: [np.empty(0, np.float32)] for name in names}
    for start, batch in _batches(scores, done, names):
        first, last = np.searchsorted(places, [start, start + batch.num_rows])
        for name, values in _values(scores, batch, names):
            counters[name].see(values)
            sampled[name].append(values[places[first:last] - start])
    sample = Sample(places, {name: np.concatenate(parts) for name, parts in sampled.items()})
    for column in columns:
        counters[column.name].look_closer(column, total, sample.scores[column.name])
    for _, batch in _batches(scores, done, names):
        for name, values in _values(scores, batch, names):
            counters[name].see_again(values)
    distributions = [counters[column.name].distribution(column, total) for column in columns]
    skipped = [column.name for column in found if column not in columns]
    return Survey(total, distributions, sample, wide, skipped)


def _chosen(scores: Scores, found: Sequence[Column], wide: Sequence[str], only: Sequence[str]) -> list[Column]:
    by_name = {column.name: column for column in found}
    for name in only:
        if name in wide:
            raise CorpusError(f"--by {name}: is not one number per row, which is what a page can show")
        if name not in by_name:
            raise CorpusError(
                f"--by {name}: {scores.store.url} has no such score; it has {', '.join(list(by_name)[:40])}"
            )
    if len(only) > MOST_SCORES:
        raise CorpusError(f"--by: {len(only)} scores are asked for; expected at most {MOST_SCORES}")
    return [by_name[name] for name in dict.fromkeys(only)] if only else list(found[:MOST_SCORES])


def _columns(scores: Scores, status: ShardStatus) -> tuple[list[Column], list[str]]:
    with opened_table(scores.store, table_path(status.shard)) as table:
        schema = table.schema_arrow
    columns, wide = [], []
    for its in schema:
        said = {key.decode("utf-8", "replace"): v.decode("utf-8", "replace") for key, v in (its.metadata or {}).items()}
        if its.type == pa.float32():
            columns.append(Column(its.name, said.get("keep", "none"), said.get("description", "")))
        elif its.name not in ("row", "id"):
            wide.append(its.name)
    return columns, wide


def _batches(scores: Scores, done: Sequence[ShardStatus], names: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The scores of every row, and how many rows lie before them."""
    place = 0
    for status in done:
        path, end = table_path(status.shard), place + (status.table.scored if status.table else 0)
        with opened_table(scores.store, path) as table:
            kinds = {its.name: its.type for its in table.schema_arrow}
            if other := [name for name in names if kinds.get(name) != pa.float32()]:
                raise CorpusError(f"{scores.store.full(path)}: {other[0]} is not one number per row, as elsewhere")
            for batch in table.iter_batches(batch_size=ROW_GROUP_ROWS, columns=["row", *names]):
                if place + batch.num_rows <= end:
                    yield place, batch
                place += batch.num_rows
        if place != end:
            raise CorpusError(f"{scores.store.full(path)}: has changed while it was read; run this again")


def _values(scores: Scores, batch: pa.RecordBatch, names: Sequence[str]) -> Iterator[tuple[str, Floats]]:
    for name in names:
        values = batch.column(name).to_numpy(zero_copy_only=False) + np.float32(0)  # there is one zero only
        if np.isinf(values).any():
            raise CorpusError(
                f"{scores.store.url}: {name} is infinite somewhere, which no run of `assay score` writes; "
                "`assay validate` says where"
            )
        yield name, values


@dataclass
class _Counter:
    """Counts one score. A float32's upper 16 bits order it; those that hold a wanted rank are then counted whole."""

    nan: int = 0
    upper: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_HALF, np.int64))
    least: float = math.inf
    most: float = -math.inf
    slots: npt.NDArray[np.int16] = field(default_factory=lambda: np.full(_HALF, -1, np.int16))
    whole: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.uint32))
    edges: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    logarithmic: bool = False
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def see(self, values: Floats) -> None:
        """The first time."""
        held = values[~np.isnan(values)]
        self.nan += len(values) - len(held)
        if held.size:
            self.upper += np.bincount(_order(held) >> 16, minlength=_HALF)
            self.least, self.most = min(self.least, float(held.min())), max(self.most, float(held.max()))

    def look_closer(self, column: Column, rows: int, sample: Floats) -> None:
        """Between both times: which values must be told apart, and the histogram's bins."""
        numbers = rows - self.nan
        if not numbers:
            return
        ranks = [_rank(share, numbers) for share in QUANTILES]
        ranks += [rank for share in SHARES if (rank := _cut_rank(column.keep, share, rows, numbers)) is not None]
        wanted = np.unique(np.searchsorted(np.cumsum(self.upper), ranks, side="right"))
        self.slots[wanted] = np.arange(len(wanted))
        self.whole = np.zeros(len(wanted) << 16, np.uint32 if rows < 1 << 32 else np.int64)
        self.edges, self.logarithmic = _edges(self.least, self.most, sample[~np.isnan(sample)])
        self.counts = np.zeros(len(self.edges) + 1, np.int64)

    def see_again(self, values: Floats) -> None:
        """The second time."""
        held = values[~np.isnan(values)]
        order = _order(held)
        slots = self.slots[order >> 16].astype(np.int64)
        np.add.at(self.whole, (slots[slots >= 0] << 16) + (order[slots >= 0] & (_HALF - 1)), 1)
        if self.edges.size:
            bins = np.searchsorted(self.edges, held, side="right")
            bins[held == self.edges[-1]] = len(self.edges) - 1
            self.counts += np.bincount(bins, minlength=len(self.counts))

    def distribution(self, column: Column, rows: int) -> Distribution:
        """What came out."""
        numbers = rows - self.nan
        if not numbers:
            empty = [Cut(share, _share_rows(share, rows), None, 0) for share in SHARES]
            none = np.zeros(0, np.int64)
            return Distribution(column, rows, self.nan, math.nan, math.nan, {}, empty, np.zeros(0), none, 0, 0)
        quantiles = {share: self._at(_rank(share, numbers))[0] for share in QUANTILES}
        cuts = [self._cut(column, share, rows) for share in SHARES]
        below, *counts, above = self.counts.tolist()
        held = np.asarray(counts, np.int64)
        drawn = self.edges, held, below, above, self.logarithmic
        return Distribution(column, rows, self.nan, self.least, self.most, quantiles, cuts, *drawn)

    def _cut(self, column: Column, share: float, rows: int) -> Cut:
        numbers, wanted = rows - self.nan, _share_rows(share, rows)
        rank = _cut_rank(column.keep, share, rows, numbers)
        if rank is None:
            return Cut(share, wanted, None, 0)
        value, before, same = self._at(rank)
        return Cut(share, wanted, value, before + same if column.keep == "low" else numbers - before)

    def _at(self, rank: int) -> tuple[float, int, int]:
        """The score of the row of this rank, from 0, ascending; how many are smaller; and how many are as large."""
        ends = np.cumsum(self.upper)
        upper = int(np.searchsorted(ends, rank, side="right"))
        before = int(ends[upper] - self.upper[upper])
        slot = int(self.slots[upper])
        here = self.whole[slot << 16 : (slot + 1) << 16].astype(np.int64)
        inner = np.cumsum(here)
        lower = int(np.searchsorted(inner, rank - before, side="right"))
        return _value(upper << 16 | lower), before + int(inner[lower] - here[lower]), int(here[lower])


def _order(values: Floats) -> npt.NDArray[np.int64]:
    """Whole numbers below 2^32 in the order of the values."""
    bits = values.view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.int64)


def _value(order: int) -> float:
    bits = order ^ (1 << 31) if order >> 31 else ~order & 0xFFFFFFFF
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def _rank(share: float, numbers: int) -> int:
    return math.floor(share * (numbers - 1))


def _share_rows(share: float, rows: int) -> int:
    """As many rows as `assay.select.top` takes for a share; a score that is no number counts among all."""
    return math.floor(share * rows + 0.5)


def _cut_rank(keep: str, share: float, rows: int, numbers: int) -> int | None:
    """The rank of the last row that the best ``share`` takes; None if it takes none."""
    wanted = min(_share_rows(share, rows), numbers)
    if not wanted:
        return None
    return wanted - 1 if keep == "low" else numbers - wanted


def _edges(least: float, most: float, sample: Floats) -> tuple[npt.NDArray[np.float64], bool]:
    """The histogram's, and whether they are evenly spaced in the logarithm.

    What lies far out by the sample's deciles is left out. The logarithm is for numbers above zero of which the deciles
    are orders of magnitude apart.
    """
    if least == most or not sample.size:
        return np.array([least, most]), False
    if most - least <= _MOST_WHOLE_NUMBERS and (sample == np.rint(sample)).all():
        return np.arange(math.floor(least) - 0.5, math.ceil(most) + 1), False
    low, high = (float(decile) for decile in np.quantile(sample.astype(np.float64), [0.1, 0.9], method="lower"))
    if least > 0 and high >= 100 * low:
        logs = _even(*(math.log(value) for value in (least, most, low, high)))
        edges = np.exp(logs)
        ends = least if logs[0] == math.log(least) else edges[0], most if logs[-1] == math.log(most) else edges[-1]
        return np.unique([ends[0], *edges[1:-1], ends[1]]), True  # without the logarithm's rounding
    return np.unique(_even(least, most, low, high)), False


def _even(least: float, most: float, low: float, high: float) -> npt.NDArray[np.float64]:
    """From 3 times the deciles' distance below the lower to as far above the upper, as far as there are values."""
    reach = 3 * (high - low) or math.inf
    return np.linspace(max(least, low - reach), min(most, high + reach), _BINS + 1)
