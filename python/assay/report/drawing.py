"""Which rows of the corpus are looked at: all, or of many those of shards that are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.corpus.layout import table_path
from assay.corpus.score_files import opened_table
from assay.corpus.scores_folder import Scores, State
from assay.corpus.shards import Shard

MOST_ROWS = 1_000_000


@dataclass(frozen=True)
class Part:
    """The first ``count`` scored rows of a shard, before which there are ``start`` of other shards."""

    shard: Shard
    start: int
    count: int
    scored: int
    """All that it has."""


def parts_to_read(scores: Scores, most: int, seed: int) -> list[Part]:
    """``most`` rows of the shards that are done: of all from the first on, or, if there are more, of drawn ones."""
    done = scores.of(State.DONE)
    counts = [status.table.scored if status.table else 0 for status in done]
    starts = np.cumsum([0, *counts]).tolist()
    order = np.arange(len(done)) if starts[-1] <= most else np.random.default_rng(seed).permutation(len(done))
    parts, left = [], most
    for i in order.tolist():
        if count := min(counts[i], left):
            parts.append(Part(done[i].shard, starts[i], count, counts[i]))
            left -= count
    return parts


def rows_of_table(scores: Scores, part: Part) -> npt.NDArray[np.int64]:
    """Which rows of its shard a part is, ascending. Fewer than promised if the table has changed."""
    return np.concatenate([np.empty(0, np.int64), *_rows(scores, part)])


def _rows(scores: Scores, part: Part) -> Iterator[npt.NDArray[np.int64]]:
    held = 0
    with opened_table(scores.store, table_path(part.shard)) as table:
        for batch in table.iter_batches(columns=["row"]):
            rows = batch.column("row").to_numpy()[: part.count - held]
            held += len(rows)
            yield rows
            if held == part.count:
                return
