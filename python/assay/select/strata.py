"""CCS, coverage-centric coreset selection: every difficulty is represented, but for the hardest. 2210.15809."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.select.best import best, parts_of, spans
from assay.select.groups import Groups, best_of_each
from assay.select.rules import Amount, Keep, amount_rows, uniforms
from assay.select.selection import Floats, Mask, Selection, oriented


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
    scored = int(np.count_nonzero(score.valid))
    hardest = int(drop * scored + 0.5)
    hard_ones = best(lambda: parts_of(score.values), table.num_rows, hardest)
    left = score.valid & ~hard_ones
    wanted, there = amount_rows(amount, table.num_rows), scored - hardest
    if wanted > there:
        raise ValueError(
            f"amount={amount}: {wanted:,} rows, but {there:,} of {table.num_rows:,} are left without the hardest "
            f"{hardest:,} by {by} and those that have no score; lower amount or drop"
        )
    groups = Groups(_strata(score.values, left, strata, by), pa.array(range(strata)))
    sizes = groups.counts(left)
    mask = best_of_each(lambda: _keys(left, seed), groups, shares(sizes, wanted))
    rule = f"{by}, {amount} by {strata} strata without the hardest {drop:g}, seed {seed}"
    facts = {"hardest_dropped": float(hardest), "strata_with_rows": float((sizes > 0).sum())}
    place = f"drawn from its stratum of {by}"
    selection = score.select(mask, rule, place, f"not {place}", facts=facts)
    return selection.because(hard_ones, f"dropped: among the {hardest:,} hardest by {by}")


def shares(sizes: npt.NDArray[np.int64], wanted: int) -> npt.NDArray[np.int64]:
    """How many of ``wanted`` rows come from each stratum of these sizes: their sum is ``wanted``, or all there are."""
    given = np.zeros_like(sizes)
    order = np.argsort(sizes, kind="stable")
    for served, stratum in enumerate(order):
        given[stratum] = min(int(sizes[stratum]), wanted // (len(order) - served))
        wanted -= int(given[stratum])
    return given


def _strata(values: npt.NDArray[Any], left: Mask, strata: int, by: str) -> npt.NDArray[np.int32]:
    """(N,), the stratum of each row that is left; 0 of the others."""
    place, ends = np.zeros(len(values), np.int32), [math.inf, -math.inf]
    for span in spans(len(values)):
        halves = _halves(values[span], left[span])
        if not np.isfinite(halves).all():
            raise ValueError(f"by={by!r}: infinite scores lie in no stratum; leave those rows out first")
        ends = [min(ends[0], halves.min(initial=math.inf)), max(ends[1], halves.max(initial=-math.inf))]
    if ends[0] < ends[1]:
        for span in spans(len(values)):
            steps = (_halves(values[span], left[span]) - ends[0]) / (ends[1] - ends[0]) * strata
            place[span][left[span]] = np.minimum(steps.astype(np.int32), strata - 1)
    return place


def _halves(values: npt.NDArray[Any], left: Mask) -> Floats:
    """Half of each score that is left, in float64: their differences are finite."""
    halves: Floats = 0.5 * values[left].astype(np.float64)
    return halves


def _keys(left: Mask, seed: int) -> Iterator[Floats]:
    """By which rows are drawn, the greatest first; NaN where a row is not left."""
    for span, noise in zip(spans(len(left)), uniforms(len(left), seed), strict=True):
        yield np.where(left[span], -noise, math.nan)
