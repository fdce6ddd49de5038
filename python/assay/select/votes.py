"""Several checkpoints or methods at once: averages, a label model over filters, a data set's quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from assay.select.selection import UNSCORED, Floats, Mask, Selection

_ROUNDS = 200
_TOLERANCE = 1e-8


def average(tables: Sequence[pa.Table], by: str) -> pa.Table:
    """The raw mean of one score over tables of the same rows (checkpoints, epochs), as a table like them.

    NaN where any of them is. Tables whose `row` or `id` columns differ are a ValueError.
    """
    first = tables[0]
    for number, table in enumerate(tables[1:], start=1):
        if not (table["row"].equals(first["row"]) and table["id"].equals(first["id"])):
            raise ValueError(f"tables[{number}] holds other rows than tables[0]; average the scores of one corpus")
    mean = np.mean([table[by].to_numpy() for table in tables], axis=0, dtype=np.float64).astype(np.float32)
    schema = pa.schema([first.schema.field(name) for name in ("row", "id", by)])
    return pa.Table.from_arrays([first["row"], first["id"], pa.array(mean, from_pandas=False)], schema=schema)


def vote(selections: Sequence[Selection]) -> Selection:
    """Combine three or more filters of the same rows into one that trusts each voter as far as it deserves.

    A voter is right with some probability on rows worth keeping and with another on the rest; both, and each
    row's posterior, come from expectation maximisation (Dawid and Skene 1979), started at the majority. A
    voter abstains where it had no score. ``weights`` are the posteriors, ``facts`` the voters' two
    accuracies. Voters must err apart: filters of one score at two thresholds are one opinion twice.
    """
    if len(selections) < 3:
        raise ValueError(f"{len(selections)} votes: the accuracies of fewer than three voters cannot be told apart")
    lengths = {len(selection.mask) for selection in selections}
    if len(lengths) > 1:
        raise ValueError(f"the votes cover {sorted(lengths)} rows; they must be about the same table")
    votes = np.stack([selection.mask for selection in selections])
    cast = np.stack([selection.scored for selection in selections])
    posterior, right_on_good, right_on_bad = _dawid_skene(votes, cast)
    judged = cast.any(axis=0)
    mask = judged & (posterior > 0.5)
    facts = {f"voter_{i}_right_on_kept": float(p) for i, p in enumerate(right_on_good)}
    facts |= {f"voter_{i}_right_on_dropped": float(p) for i, p in enumerate(right_on_bad)}
    return Selection(
        f"label model over {len(selections)} votes",
        mask,
        np.where(judged, mask, UNSCORED).astype(np.uint8),
        ("dropped: by the label model", "kept: by the label model", "dropped: no voter had a score"),
        weights=np.where(judged, posterior, 0.0),
        facts=facts,
    )


def _dawid_skene(votes: Mask, cast: Mask) -> tuple[Floats, Floats, Floats]:
    """Votes (K, N), which were cast -> P(keep) (N,), accuracy on rows to keep (K,) and on the rest (K,)."""
    yes, no = votes & cast, ~votes & cast
    posterior: Floats = (yes.sum(0) + 0.5) / (cast.sum(0) + 1.0)
    for _ in range(_ROUNDS):
        share = (posterior.sum() + 1) / (len(posterior) + 2)
        # One imaginary right and one wrong vote each keep the logarithms finite.
        good = (yes @ posterior + 1) / (cast @ posterior + 2)
        bad = (no @ (1 - posterior) + 1) / (cast @ (1 - posterior) + 2)
        odds = np.log(share / (1 - share)) + np.log(good / (1 - bad)) @ yes + np.log((1 - good) / bad) @ no
        updated = 1 / (1 + np.exp(-np.clip(odds, -500, 500)))
        change = float(np.abs(updated - posterior).max(initial=0.0))
        posterior = updated
        if change < _TOLERANCE:
            break
    return posterior, good, bad


@dataclass(frozen=True)
class Quality:
    """An estimate of how good a data set is: the share that a filter keeps, and mean scores."""

    rows: int
    share_kept: float
    mean_score: float
    mean_kept: float
    mean_dropped: float


def quality(table: pa.Table, by: str, selection: Selection) -> Quality:
    """Judge a data set by a filter and a score. Means pass over NaN; a mean of nothing is NaN."""
    scores = table[by].to_numpy().astype(np.float64)
    if len(scores) != len(selection.mask):
        raise ValueError(f"the selection covers {len(selection.mask)} rows, the table {len(scores)}")
    return Quality(
        len(scores),
        float(selection.mask.mean()) if len(scores) else float("nan"),
        _mean(scores),
        _mean(scores[selection.mask]),
        _mean(scores[~selection.mask]),
    )


def _mean(values: Floats) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
