"""CCS, coverage-centric coreset selection: every difficulty is represented, but for the hardest. 2210.15809."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.select.rules import Amount, Keep, amount_rows, uniform
from assay.select.selection import Selection, oriented


def ccs(
    table: pa.Table, by: str, amount: Amount, seed: int, *, hard: Keep, drop: float = 0.1, strata: int = 50
) -> Selection:
    """Drop the hardest rows, cut what is left of the score's range into equal strata, and draw from each alike.

    The smallest stratum is served first, with its equal share of what is still to be drawn or all of its rows; what it
    lacks goes to the others (algorithm 1). So exactly ``amount`` rows are kept.

    Args:
        table: with the column ``by``, a score of difficulty.
        amount: as in `top`.
        seed: of the draws within strata.
        hard: the end of ``by`` that is hard, whichever its column says to keep: ``"high"`` of a loss, EL2N or GraNd,
            ``"low"`` of a margin.
        drop: the share of the scored rows, from the hard end, that is dropped first: about the share of wrong labels.
        strata: their number. Of equal width, so that some may be empty.

    Raises:
        ValueError: a share or number out of its range, fewer rows than ``amount`` beside the hardest, or infinite
            scores among them.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop={drop}: expected a share of at least 0 and less than 1")
    if strata < 1:
        raise ValueError(f"strata={strata}: expected at least 1")
    if hard not in ("high", "low"):
        raise ValueError(f"hard={hard!r}: expected 'high' or 'low'")
    score = oriented(table, by, hard)
    scored = np.flatnonzero(score.valid)
    hardest = int(drop * len(scored) + 0.5)
    left = scored[np.argsort(-score.values[scored], kind="stable")[hardest:]]
    wanted = amount_rows(amount, table.num_rows)
    if wanted > len(left):
        raise ValueError(
            f"amount={amount}: {wanted:,} rows, but {len(left):,} of {table.num_rows:,} are left without the hardest "
            f"{hardest:,} by {by} and those that have no score; lower amount or drop"
        )
    worth = score.values[left].astype(np.float64)
    if not np.isfinite(worth).all():
        raise ValueError(f"by={by!r}: infinite scores lie in no stratum; leave those rows out first")
    place = _strata(worth, strata)
    sizes = np.bincount(place, minlength=strata)
    kept = _draw(left, place, shares(sizes, wanted), uniform(table.num_rows, seed))
    mask = np.zeros(table.num_rows, bool)
    mask[kept] = True
    rule = f"{by}, {amount} by {strata} strata without the hardest {drop:g}, seed {seed}"
    facts = {"hardest_dropped": float(hardest), "strata_with_rows": float((sizes > 0).sum())}
    return score.select(mask, rule, f"drawn from its stratum of {by}", "among the hardest, or not drawn", facts=facts)


def shares(sizes: npt.NDArray[np.int64], wanted: int) -> npt.NDArray[np.int64]:
    """How many of ``wanted`` rows come from each stratum of these sizes: their sum is ``wanted``, or all there are."""
    given = np.zeros_like(sizes)
    order = np.argsort(sizes, kind="stable")
    for served, stratum in enumerate(order):
        given[stratum] = min(int(sizes[stratum]), wanted // (len(order) - served))
        wanted -= int(given[stratum])
    return given


def _strata(values: npt.NDArray[Any], strata: int) -> npt.NDArray[np.int64]:
    if not len(values) or values.min() == values.max():
        return np.zeros(len(values), np.int64)
    halves = 0.5 * values.astype(np.float64)  # whose differences are finite
    steps = (halves - halves.min()) / (halves.max() - halves.min()) * strata
    place: npt.NDArray[np.int64] = np.minimum(steps.astype(np.int64), strata - 1)
    return place


def _draw(
    rows: npt.NDArray[np.int64],
    place: npt.NDArray[np.int64],
    given: npt.NDArray[np.int64],
    keys: npt.NDArray[np.float64],
) -> npt.NDArray[np.int64]:
    """Of each stratum as many rows as it is given, those with the least keys."""
    order = np.lexsort((keys[rows], place))
    ordered = place[order]
    starts = np.searchsorted(ordered, np.arange(len(given)))
    rank = np.arange(len(order)) - starts[ordered]
    drawn: npt.NDArray[np.int64] = rows[order[rank < given[ordered]]]
    return drawn
