"""The best and the worst samples of a scores folder, with the rows of the corpus that they are."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.corpus.errors import CorpusError, ShardError
from assay.corpus.layout import table_path
from assay.corpus.readers import read
from assay.corpus.score_files import rows_at, score_field, stream_score
from assay.corpus.scores_folder import Scores, State
from assay.corpus.shards import Shard
from assay.curate.rules import parse_end


@dataclass(frozen=True)
class Ranked:
    """A sample and its scores: where its row lies, and every score of one number."""

    shard: Shard
    row: int
    id: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Ranking:
    """The two ends of a score, the best and the worst sample first, and samples whose score is NaN."""

    by: str
    keep: str
    """The better end: high or low."""
    description: str
    rows: int
    nan: int
    best: tuple[Ranked, ...]
    worst: tuple[Ranked, ...]
    without: tuple[Ranked, ...]
    left_out: Mapping[str, str]
    """Shards of the corpus that are not in it, and why."""


@dataclass
class _End:
    """The ``count`` best of what was seen so far: values (negated where low is wanted), tables, places, in order."""

    count: int
    sign: float
    values: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    places: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))

    def see(self, table: int, start: int, values: npt.NDArray[np.float32]) -> None:
        """Take what is better than the last of those held; of equals the earlier stays."""
        if not self.count:
            return
        signed = values * np.float32(self.sign)
        better = ~np.isnan(signed)
        if len(self.values) == self.count:
            better &= signed > self.values[-1]
        new = np.flatnonzero(better)
        new = new[np.argsort(-signed[new], kind="stable")[: self.count]]
        places = np.stack([np.full(len(new), table), start + new], axis=1)
        values, places = np.concatenate([self.values, signed[new]]), np.concatenate([self.places, places])
        order = np.argsort(-values, kind="stable")[: self.count]
        self.values, self.places = values[order], places[order]


def score_name(scores: Scores, name: str | None) -> str:
    """The score that ``--by`` asks for, the first without it. CorpusError if there is none of that name."""
    if not scores.columns:
        raise CorpusError(f"{scores.store.url}: holds no scores")
    if name is None:
        return scores.columns[0]
    if name not in scores.columns:
        near = difflib.get_close_matches(name, scores.columns, n=1, cutoff=0.5)
        known = f"; did you mean {near[0]}?" if near else f", only {', '.join(scores.columns)}"
        raise CorpusError(f"--by {name}: {scores.store.url} has no such score{known}")
    return name


def rank(
    scores: Scores, by: str | None, *, best: int = 5, worst: int = 5, without: int = 0, keep: str | None = None
) -> Ranking:
    """The ``best`` and ``worst`` samples by one score, and the first ``without`` a number for a score.

    Tables are read a batch at a time, and no more samples are held than asked for; of equal scores the earlier row
    comes first. Shards whose table is missing, or is not about the shard as it is now, are left out and named.

    Raises:
        CorpusError: there is no such score, it is not one number per sample, or neither it nor ``keep`` says which
            end is better.
    """
    name = score_name(scores, by)
    counts = {"best": best, "worst": worst, "nan": without}
    for what, count in counts.items():
        if count < 0:
            raise CorpusError(f"--{what} {count}: expected 0 or more")
    shards = [status.shard for status in scores.of(State.DONE)]
    left_out = {s.shard.path: s.detail or s.state.value for s in scores.shards if s.state is not State.DONE}
    if not shards:
        first = "".join(f" ({path}: {why})" for path, why in list(left_out.items())[:1])
        raise CorpusError(f"{scores.store.url}: no shard of {scores.corpus_path} is scored as it is now{first}")
    column = score_field(scores.store, table_path(shards[0]), name)
    better = _direction(column, keep)
    up = 1.0 if better == "high" else -1.0
    top, bottom = _End(best, up), _End(worst, -up)
    lacking: list[tuple[int, int]] = []
    rows = nan = 0
    for table, shard in enumerate(shards):
        start = 0
        for values in stream_score(scores.store, table_path(shard), name):
            for end in (top, bottom):
                end.see(table, start, values)
            bare = np.flatnonzero(np.isnan(values))
            lacking += [(table, start + int(i)) for i in bare[: without - len(lacking)]]
            nan += len(bare)
            start += len(values)
        rows += start
    found = [ranked_at(scores, shards, places) for places in (top.places.tolist(), bottom.places.tolist(), lacking)]
    described = (column.metadata or {}).get(b"description", b"").decode("utf-8", "replace")
    return Ranking(name, better, described, rows, nan, found[0], found[1], found[2], left_out)


def _direction(column: pa.Field, keep: str | None) -> str:
    said = parse_end(keep) or (column.metadata or {}).get(b"keep", b"").decode("utf-8", "replace")
    if said not in ("high", "low"):
        raise CorpusError(f"--by {column.name}: stands for neither end; say which is better with --keep high or low")
    return said


def ranked_at(scores: Scores, shards: Sequence[Shard], places: Sequence[Sequence[int]]) -> tuple[Ranked, ...]:
    """The samples at (index of the shard, place in its table), in that order."""
    found: dict[tuple[int, int], Ranked] = {}
    for table in sorted({table for table, _ in places}):
        here = [place for its, place in places if its == table]
        for place, entry in zip(here, rows_at(scores.store, table_path(shards[table]), here), strict=True):
            row, sample_id = entry.pop("row"), entry.pop("id")
            found[table, place] = Ranked(shards[table], row, sample_id, entry)
    return tuple(found[table, place] for table, place in places)


def read_samples(ranked: Sequence[Ranked], columns: Sequence[str]) -> dict[tuple[str, int], dict[str, Any] | str]:
    """By shard and row, the values of some columns of the corpus, or why there are none. A key that a row lacks, as a
    JSON line without tools, is null.

    A shard is read up to the last row that is wanted, a chunk in memory at a time.
    """
    wanted: dict[Shard, set[int]] = {}
    for sample in ranked:
        wanted.setdefault(sample.shard, set()).add(sample.row)
    found: dict[tuple[str, int], dict[str, Any] | str] = {}
    for shard, rows in wanted.items():
        missing = "the shard ends before it"
        try:
            for row, values in _rows(shard, rows, columns):
                found[shard.path, row] = values
        except (ShardError, OSError) as error:
            missing = str(error)
        found |= {(shard.path, row): missing for row in rows if (shard.path, row) not in found}
    return found


def _rows(shard: Shard, rows: set[int], columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    left = sorted(rows, reverse=True)
    for chunk in read(shard, columns, frozenset(columns)):
        while left and left[-1] < chunk.first + chunk.length:
            offset = left.pop() - chunk.first
            values = {name: chunk.columns[name][offset] for name in columns}
            yield chunk.first + offset, chunk.faults.get(offset, values)
        if not left:
            return
