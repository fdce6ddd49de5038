"""Rules that need no model: the best so many, a threshold, a quantile, and seeded draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.select.best import Keys, best, limit_of, parts_of, spans
from assay.select.groups import Groups, best_of_each, groups_of
from assay.select.selection import Floats, Mask, OrientedScore, Selection, as_score, oriented

Keep = Literal["high", "low"]
Amount = int | float


def top(table: pa.Table, by: str, amount: Amount, keep: Keep | None = None, group: str | None = None) -> Selection:
    """The best ``amount`` rows by score ``by``.

    An int is a number of rows, a float a share of the table's rows: ``1`` is one row and ``1.0`` all of them.
    Rows that have no score count towards the share but are never kept. With ``group``, a column of the table, so many
    of each group.
    """
    score = oriented(table, by, keep)
    mask, limits = _take(table, lambda: parts_of(score.values), amount, group, score)
    if group is not None:
        place = f"among the {amount} {score.end} of {by} of its {group}"
        rule = f"{by}, {score.end} {amount} of each {group}"
        return score.select(mask, rule, place, f"not {place}", limits=limits)
    limit = score.sign * float(score.values[mask].min()) if mask.any() else None
    place = f"among the {amount_rows(amount, table.num_rows):,} {score.end} of {by}"
    return score.select(mask, f"{by}, {score.end} {amount}", place, f"not {place}", threshold=limit)


def _take(
    table: pa.Table, keys: Keys, amount: Amount, group: str | None, score: OrientedScore | None = None
) -> tuple[Mask, Floats | None]:
    """The ``amount`` rows of the greatest keys, of all or of each group; and where each group's ``score`` is cut."""
    if group is None:
        return best(keys, table.num_rows, amount_rows(amount, table.num_rows)), None
    groups = groups_of(table, group)
    most, counts = amount_rows(amount, table.num_rows), groups.counts()
    wanted = np.minimum(most, counts) if isinstance(amount, int) else np.floor(amount * counts + 0.5).astype(np.int64)
    mask = best_of_each(keys, groups, wanted)
    return mask, None if score is None else score.sign * groups.least(score.values, mask)


def threshold(table: pa.Table, by: str, value: float, keep: Keep | None = None) -> Selection:
    """Rows whose score is ``value`` or better. Of a column of float32, 0.7 is the float32 that is written so.

    ValueError for NaN, which no score is.
    """
    if math.isnan(value):
        raise ValueError(f"threshold {value}: expected a number")
    score = oriented(table, by, keep)
    limit = as_score(value) if score.values.dtype == np.float32 else value
    return score.cut(score.sign * limit, f"{by}, threshold {value:g}")


def quantile(table: pa.Table, by: str, q: float, keep: Keep | None = None, group: str | None = None) -> Selection:
    """Rows at or beyond the ``q``-quantile of worth: 0.9 keeps the best tenth, whichever end is best.

    With ``group``, a column of the table, the quantile is each group's own.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"q={q}: expected a number from 0 to 1")
    score = oriented(table, by, keep)
    rule = f"{by}, quantile {q:g}"
    # An order statistic, not a point between two: then the row at the quantile is kept whatever the rounding.
    if group is not None:
        return _quantile_of_each(score, q, groups_of(table, group), group)
    if not score.valid.any():
        return score.cut(math.inf, rule)
    count = int(np.count_nonzero(score.valid))
    limit, _ = limit_of(lambda: parts_of(score.values), table.num_rows, count - math.floor(q * (count - 1)))
    return score.cut(float(limit), rule)


def _quantile_of_each(score: OrientedScore, q: float, groups: Groups, group: str) -> Selection:
    counts = groups.counts(score.valid)
    wanted = counts - np.floor(q * np.maximum(counts - 1, 0)).astype(np.int64)
    limits = groups.least(score.values, best_of_each(lambda: parts_of(score.values), groups, wanted))
    mask = np.zeros(len(score.values), bool)
    for span in spans(len(mask)):
        mask[span] = score.values[span] >= limits[groups.codes[span]]
    side = ("at least", "below") if score.sign > 0 else ("at most", "above")
    kept, dropped = (f"{score.name} {word} the quantile {q:g} of its {group}" for word in side)
    return score.select(
        mask, f"{score.name}, quantile {q:g} of each {group}", kept, dropped, limits=score.sign * limits
    )


def sample(
    table: pa.Table,
    by: str,
    amount: Amount,
    seed: int,
    temperature: float | None = None,
    keep: Keep | None = None,
    group: str | None = None,
) -> Selection:
    """Draw ``amount`` rows (as in `top`) without replacement, each next row in proportion to its score.

    With a ``temperature`` the proportions are softmax(worth / temperature) instead, which also serves scores
    that are negative or kept at the low end. Rows of score zero are never drawn. (Gumbel top-k, which is
    Efraimidis and Spirakis's scheme in logarithms.)
    """
    score = oriented(table, by, keep)
    _check_proportions(score, temperature)
    mask, _ = _take(table, lambda: _draw_keys(score, temperature, seed), amount, group)
    of_each = "" if group is None else f" of each {group}"
    how = "in proportion to" if temperature is None else f"by softmax at temperature {temperature:g} of"
    return score.select(
        mask,
        f"{amount}{of_each} drawn {how} {by}, seed {seed}",
        f"drawn {how} {by}",
        "not drawn",
    )


def draw(
    table: pa.Table,
    by: str,
    count: int,
    seed: int,
    temperature: float | None = None,
    keep: Keep | None = None,
) -> npt.NDArray[np.int64]:
    """``count`` rows' positions, drawn *with* replacement in the proportions of `sample`, in the order of the draw."""
    logits = log_proportions(oriented(table, by, keep), temperature)
    drawable = np.flatnonzero(logits > -np.inf)
    if not drawable.size or not np.isfinite(logits[drawable]).all():
        raise ValueError(f"by={by!r}: expected finite scores to draw by, found none or infinite ones")
    sums = np.cumsum(np.exp(logits[drawable] - logits[drawable].max()))
    wanted = uniform(count, seed) * sums[-1]
    order = np.argsort(wanted, kind="stable")  # looked up in their order, millions miss no cache
    places = np.empty(count, np.int64)
    places[order] = np.searchsorted(sums, wanted[order], side="right")
    drawn: npt.NDArray[np.int64] = drawable[np.minimum(places, len(drawable) - 1)]  # a product may round up to the sum
    return drawn


def weigh(table: pa.Table, selection: Selection, by: str, temperature: float, keep: Keep | None = None) -> Selection:
    """The same rows with weights n · softmax(worth / temperature) over the n kept ones: mean 1. The others' are 0.

    Worth is the score or, if it is better when low, its negative. ValueError if a kept row's score is not finite.
    """
    score = oriented(table, by, keep)
    _check_proportions(score, temperature)
    logits = _logits(score.values[selection.mask], temperature)
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).sum())
        raise ValueError(
            f"by={by!r}: {bad} kept rows have no finite score to be weighed by; leave them out by it first"
        )
    weights = np.zeros(table.num_rows)
    if logits.size:
        shares = np.exp(logits - logits.max())
        weights[selection.mask] = shares * (len(shares) / shares.sum())
    rule = f"{selection.rule}, weighed by softmax at temperature {temperature:g} of {by}"
    return replace(selection, rule=rule, weights=weights)


def log_proportions(score: OrientedScore, temperature: float | None) -> Floats:
    """Logarithms of what rows are drawn in proportion to; -inf for those that never are."""
    _check_proportions(score, temperature)
    return _logits(score.values, temperature)


def _check_proportions(score: OrientedScore, temperature: float | None) -> None:
    if temperature is not None:
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: expected a positive number")
        return
    least = np.fmin.reduce(score.values, initial=np.inf)  # NaN aside
    if score.sign < 0:
        raise ValueError(f"by={score.name!r} is better when low, so it is no proportion; pass a temperature")
    if least < 0:
        raise ValueError(f"by={score.name!r} goes down to {least:.6g}, no proportion; pass a temperature")


def _logits(worth: npt.NDArray[Any], temperature: float | None) -> Floats:
    wide: Floats = worth.astype(np.float64)
    with np.errstate(divide="ignore"):
        logits = np.log(wide) if temperature is None else wide / temperature
    logits[np.isnan(wide)] = -np.inf
    return logits


def random(table: pa.Table, amount: Amount, seed: int, group: str | None = None) -> Selection:
    """Draw ``amount`` rows (as in `top`) uniformly: the control by which every other rule is judged."""
    mask, _ = _take(table, lambda: (-part for part in uniforms(table.num_rows, seed)), amount, group)
    of_each = "" if group is None else f" of each {group}"
    return Selection(
        f"{amount}{of_each} drawn at random, seed {seed}",
        mask,
        mask.view(np.uint8),
        ("dropped: not drawn", "kept: drawn at random"),
    )


def amount_rows(amount: Amount, total: int) -> int:
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise ValueError(f"amount={amount!r}: expected a number of rows (int) or a share (float)")
    if isinstance(amount, int):
        if amount < 0:
            raise ValueError(f"amount={amount}: expected at least 0 rows")
        return min(amount, total)
    if not 0 <= amount <= 1:
        raise ValueError(f"amount={amount}: a share lies between 0.0 and 1.0; for a number of rows pass an int")
    return math.floor(amount * total + 0.5)


def uniform(rows: int, seed: int) -> Floats:
    """Philox's raw stream: unlike numpy's distributions, it is promised never to change."""
    return np.concatenate([np.empty(0), *uniforms(rows, seed)])


def uniforms(rows: int, seed: int) -> Iterator[Floats]:
    """The same, in the parts of `parts_of`."""
    stream = np.random.Philox(seed)
    for span in spans(rows):
        raw = stream.random_raw(span.stop - span.start)
        yield (np.asarray(raw >> np.uint64(11), dtype=np.float64) + 0.5) * 2.0**-53


def _draw_keys(score: OrientedScore, temperature: float | None, seed: int) -> Iterator[Floats]:
    """Gumbel noise on the logarithms of the proportions; NaN where a row is never drawn."""
    for worth, noise in zip(parts_of(score.values), uniforms(len(score.values), seed), strict=True):
        logits = _logits(worth, temperature)
        logits[logits == -np.inf] = np.nan
        yield logits - np.log(-np.log(noise))
