"""What the page asks: how many rows some cuts keep, of which shards and kinds, and the rows beside a cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay._lazy import require
from assay.corpus.scores_folder import Scores
from assay.curate.held import HeldRows, hold, scratch
from assay.curate.ranking import Ranked, ranked_at
from assay.curate.rows import Rows
from assay.curate.where import ask, parse_condition
from assay.curate.whole import scored_shards
from assay.explore.cuts import Cut, condition_text
from assay.explore.groupings import CHUNK, Grouping, by_column, by_shard, counted
from assay.report import Distribution, Shown, Survey, read_groups, survey

SAMPLES = 4
SECONDS = 120.0

Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]
Show = Callable[[Sequence[Ranked]], Sequence[Shown]]


@dataclass(frozen=True)
class Explorer:
    """Answers from what was read once; of the corpus only rows that are to be shown are read.

    Attributes:
        kinds: the columns that a condition may name.
        shown: the scores that can be cut at, which have two different numbers at least.
        bins: by score, of each row the bin of its histogram, from 1 on; 0 where it is in none.
        not_grouped: columns that were to be grouped by, and why they are not.
        command: makes of a condition the command that keeps its rows.
        show: reads rows of the corpus as they are to be shown.
        report: makes the page of `assay report`; ImportError without matplotlib.
    """

    scores: Scores
    rows: HeldRows
    kinds: Mapping[str, pa.DataType]
    survey: Survey
    shown: Sequence[Distribution]
    bins: Mapping[str, npt.NDArray[np.uint8]]
    groupings: Sequence[Grouping]
    not_grouped: Mapping[str, str]
    command: Callable[[str], str]
    show: Show
    report: Callable[[], str]

    @property
    def names(self) -> list[str]:
        """The scores that can be cut at."""
        return [its.column.name for its in self.shown]

    def count(self, cuts: Sequence[Cut]) -> dict[str, Any]:
        """How many rows pass, what they are, and the command that keeps them, or why there is none."""
        passes, lacking = self._judge(cuts)
        kept = int(np.count_nonzero(passes))
        return {
            "kept": kept,
            "lacking": {str(self.names.index(name)): count for name, count in lacking.items()},
            **self._command(cuts, kept),
            "bins": [
                counted(self.bins[its.column.name], passes, len(its.counts) + 1)[1:].tolist() for its in self.shown
            ],
            "groups": [counted(its.codes, passes, len(its.names)).tolist() for its in self.groupings],
        }

    def _command(self, cuts: Sequence[Cut], kept: int) -> dict[str, str]:
        if not cuts:
            return {"command": "", "why": "There is no cut yet: all rows are kept."}
        if not kept:
            return {"command": "", "why": "No row is kept, and there is no command for that."}
        try:
            return {"command": self.command(condition_text(cuts)), "why": ""}
        except ValueError as error:
            return {"command": "", "why": str(error)}

    def near(self, cuts: Sequence[Cut], at: str) -> dict[str, Sequence[Shown]]:
        """On either side of the cut at the score ``at`` the rows that are nearest to it and pass all other cuts."""
        cut = next(its for its in cuts if its.score == at)
        passes, _ = self._judge([its for its in cuts if its is not cut])
        return {
            "kept": self._show(_nearest(self.rows.values[at], passes, cut, True)),
            "dropped": self._show(_nearest(self.rows.values[at], passes, cut, False)),
        }

    def some(self, cuts: Sequence[Cut], seed: int) -> dict[str, Sequence[Shown]]:
        """Rows drawn uniformly from those that pass and from those that do not."""
        passes, _ = self._judge(cuts)
        rng = np.random.default_rng(seed)
        return {"kept": self._show(_drawn(passes, rng)), "dropped": self._show(_drawn(~passes, rng))}

    def _judge(self, cuts: Sequence[Cut]) -> tuple[Mask, Mapping[str, int]]:
        """Which rows pass, as `assay select` judges them, and how many lack a score that is cut at."""
        if not cuts:
            return np.ones(len(self.rows), bool), {}
        rows = replace(self.rows, until=time.monotonic() + SECONDS)
        answer = ask(rows, parse_condition(condition_text(cuts), self.kinds))
        return answer.passes, answer.counts()["nan"]

    def _kept_bins(self, its: Distribution, passes: Mask) -> list[int]:
        kept: list[int] = counted(self.bins[its.column.name], passes, len(its.counts) + 1)[1:].tolist()
        return kept

    def _show(self, places: Places) -> Sequence[Shown]:
        starts = np.cumsum([0, *(table.scored for _, table in self.rows.tables)])
        tables = np.searchsorted(starts, places, side="right") - 1
        at = np.stack([tables, places - starts[tables]], axis=1).tolist()
        return self.show(ranked_at(self.scores, [shard for shard, _ in self.rows.tables], at))


def open_explorer(
    scores: Scores,
    columns: Sequence[str],
    command: Callable[[str], str],
    show: Show,
    report: Callable[[], str],
    only: Sequence[str] = (),
    seed: int = 0,
) -> Explorer:
    """Read the scores, or ``only`` these, and of the corpus the ``columns`` to group by.

    CorpusError if the scores do not cover the corpus as it is now, by which `assay select` would select nothing.
    ImportError without DuckDB.
    """
    require("duckdb", "sql")
    tables = scored_shards(scores)
    numbers = survey(scores, seed, only)
    shown = [its for its in numbers.distributions if its.minimum < its.maximum]
    held = hold(Rows(scores.store, tables), [its.column.name for its in shown])
    bins = {its.column.name: _bins(held.values[its.column.name], its) for its in shown}
    found, not_grouped = read_groups(scores, columns, seed)
    shards = by_shard([shard.path for shard, _ in tables], [table.scored for _, table in tables])
    groupings = ([shards] if len(tables) > 1 else []) + [by_column(its) for its in found]
    return Explorer(scores, held, held.names(), numbers, shown, bins, groupings, not_grouped, command, show, report)


def _bins(values: npt.NDArray[np.float32], its: Distribution) -> npt.NDArray[np.uint8]:
    found: npt.NDArray[np.uint8] = scratch(values.shape, np.uint8)
    last = len(its.edges) - 1
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        places = np.searchsorted(its.edges, part, side="right")
        places[part == its.edges[-1]] = last  # the last bin holds its upper edge
        places[(places > last) | np.isnan(part)] = 0
        found[start : start + CHUNK] = places
    return found


def _nearest(values: npt.NDArray[np.float32], passes: Mask, cut: Cut, kept: bool) -> Places:
    """The rows nearest to the cut on one side of it, the nearest first; of equally near ones the earlier."""
    places, distances = np.empty(0, np.int64), np.empty(0)
    for start in range(0, len(values), CHUNK):
        above = values[start : start + CHUNK].astype(np.float64) - cut.value
        beyond = above if cut.keep == "high" else -above
        side = (beyond >= 0) if kept else (beyond < 0)  # neither holds of NaN
        here = np.flatnonzero(side & passes[start : start + CHUNK])
        places = np.concatenate([places, start + here])
        distances = np.concatenate([distances, np.abs(above[here])])
        best = np.argsort(distances, kind="stable")[:SAMPLES]
        places, distances = places[best], distances[best]
    return places


def _drawn(mask: Mask, rng: np.random.Generator) -> Places:
    here = np.flatnonzero(mask)
    return here[rng.choice(len(here), min(SAMPLES, len(here)), replace=False)] if len(here) else here
