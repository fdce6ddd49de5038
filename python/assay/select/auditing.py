"""The cut that a labelled sample defends: maximal F_β (2210.10221), with its bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.select.best import spans
from assay.select.groups import groups_of
from assay.select.rules import Keep
from assay.select.selection import Floats, Mask, Selection, oriented

DRAWS = 1000
LEAST = 20
"""Labels of both kinds that a group needs for a cut of its own."""
_TAIL = 0.025


@dataclass(frozen=True)
class Cut:
    """Where to cut a score, and what that is worth on the labelled rows.

    Attributes:
        threshold: in the score's own units; a row's score, which is kept.
        threshold_interval: the middle 95 % of the best cuts of the bootstrap's draws.
        f, precision, recall: of the labelled rows at the threshold. As it was chosen on them, they flatter it.
        f_interval: the middle 95 % of F_β at this threshold over the draws.
        f_held_out: the mean over the draws of F_β of a draw's own best cut on the rows that it did not draw: what the
            choice is worth on rows that it has not seen. NaN where no draw left rows of both labels.
        rows, worth_keeping: labelled rows, and those of them that are to be kept.
        unscored: labelled rows without a score, which no cut keeps; those worth keeping count as missed.
    """

    threshold: float
    threshold_interval: tuple[float, float]
    beta: float
    f: float
    f_interval: tuple[float, float]
    f_held_out: float
    precision: float
    recall: float
    rows: int
    worth_keeping: int
    unscored: int
    draws: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The same, without what is no number."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if not (isinstance(value, float) and math.isnan(value))
        }


def fbeta_cut(
    table: pa.Table,
    by: str,
    labels: npt.ArrayLike,
    beta: float = 1.0,
    seed: int = 0,
    keep: Keep | None = None,
    draws: int = DRAWS,
) -> Cut:
    """The cut of score ``by`` that maximises F_β = (1 + β²) TP / (β² P + kept) on labelled rows (2210.10221).

    Each row's score is tried as the cut, equal scores together; of cuts with the same F_β the strictest is taken.

    Args:
        table: the labelled rows, a random sample of what is to be cut. A row whose score is NaN is never kept.
        labels: (n,) Booleans, whether a row is worth keeping.
        beta: above 1 it is worse to miss a good row than to keep a bad one; below 1 the other way round.
        seed: of the bootstrap, which draws the n rows anew ``draws`` times.

    Raises:
        ValueError: the labels are of one kind only, or no row worth keeping has a score.
    """
    good = np.asarray(labels, bool)
    score = oriented(table, by, keep)
    if good.shape != (table.num_rows,):
        raise ValueError(f"labels have shape {good.shape}; expected ({table.num_rows},), one for each row")
    if not (beta > 0 and 0 < beta * beta < math.inf):
        raise ValueError(f"beta={beta}: expected a positive number whose square is one, too")
    if good.all() or not good.any():
        raise ValueError(f"labels: all {len(good)} are {int(good.any())}; expected both 1 (keep) and 0 (drop)")
    if not (good & score.valid).any():
        raise ValueError(f"labels: none of the {int(good.sum())} rows that are worth keeping has a number in {by}")
    curve = _Curve(score.values.astype(np.float64), score.valid, good, beta)
    ones = np.ones(len(good))
    at = int(np.argmax(curve.f(ones)))
    best, at_best, held_out = _bootstrap(curve, at, len(good), seed, draws)
    limits = [score.sign * curve.limits[place] for place in _middle(np.array(best))]
    lowest, highest = _middle(np.array(at_best))
    kept, found = curve.counts(ones)
    return Cut(
        score.sign * float(curve.limits[at]),
        (float(min(limits)), float(max(limits))),
        float(beta),
        float(curve.f(ones)[at]),
        (float(lowest), float(highest)),
        float(np.mean(held_out)) if held_out else math.nan,
        float(found[at] / kept[at]),
        float(found[at] / good.sum()),
        len(good),
        int(good.sum()),
        int((~score.valid).sum()),
        draws,
        seed,
    )


@dataclass(frozen=True)
class GroupCuts:
    """A cut for each group: classes, sources.

    Attributes:
        pooled: of all labelled rows, whatever their group.
        cuts: of each group with at least `LEAST` labelled rows, of both kinds.
        few: the labelled rows of each other group that has any: these, and groups that have none, are cut where all
            labelled rows together are.
    """

    pooled: Cut
    cuts: Mapping[str | None, Cut]
    few: Mapping[str | None, int]

    def threshold(self, group: str | None) -> float:
        """Where a group is cut, in the score's own units."""
        return self.cuts.get(group, self.pooled).threshold

    def to_json(self) -> dict[str, Any]:
        """The pooled cut, and those of the groups; a group without a name is null."""
        own = [{"group": name, **cut.to_json()} for name, cut in self.cuts.items()]
        few = [{"group": name, "rows": rows} for name, rows in self.few.items()]
        return {**self.pooled.to_json(), "groups": own, "pooled_for": few, "least": LEAST}


def fbeta_cuts(
    table: pa.Table,
    by: str,
    labels: npt.ArrayLike,
    groups: Sequence[str | None],
    beta: float = 1.0,
    seed: int = 0,
    keep: Keep | None = None,
    draws: int = DRAWS,
    pooled: Cut | None = None,
) -> GroupCuts:
    """The cut of each group, by its own labelled rows alone, without iteration (2210.10221); see `fbeta_cut`.

    Args:
        table, labels: as there.
        groups: (n,) which group each labelled row is of.
        pooled: the cut of groups with too few labels, if it is not that of these rows.

    Raises:
        ValueError: as there, of all rows together; a group's own rows are never too few.
    """
    pooled = fbeta_cut(table, by, labels, beta, seed, keep, draws) if pooled is None else pooled
    good = np.asarray(labels, bool)
    if len(groups) != len(good):
        raise ValueError(f"groups: expected one for each of the {len(good)} rows, got {len(groups)}")
    rows: dict[str | None, list[int]] = {}
    for row, name in enumerate(groups):
        rows.setdefault(name, []).append(row)
    cuts: dict[str | None, Cut] = {}
    few: dict[str | None, int] = {}
    valid = oriented(table, by, keep).valid
    for name, its in rows.items():
        own = good[its]
        if len(its) < LEAST or own.all() or not (own & valid[its]).any():
            few[name] = len(its)
        else:
            cuts[name] = fbeta_cut(table.take(pa.array(its)), by, own, beta, seed, keep, draws)
    return GroupCuts(pooled, cuts, few)


def cut_groups(table: pa.Table, by: str, cuts: GroupCuts, group: str, keep: Keep | None = None) -> Selection:
    """Rows whose score is as good as the cut of their group, a column of the table, or better."""
    score, groups = oriented(table, by, keep), groups_of(table, group)
    names = groups.names.to_pylist()
    limits = np.array([score.sign * cuts.threshold(name) for name in names], np.float64)
    mask = np.zeros(table.num_rows, bool)
    for span in spans(len(mask)):
        mask[span] = score.values[span] >= limits[groups.codes[span]]
    side = ("at least", "below") if score.sign > 0 else ("at most", "above")
    kept, dropped = (f"{by} {word} the cut of its {group}" for word in side)
    own = sum(name in cuts.cuts for name in names)
    told = f"{by}, cut by F{cuts.pooled.beta:g} of {cuts.pooled.rows:,} labels in {own:,} of {len(names):,} {group}"
    return score.select(mask, told, kept, dropped, limits=score.sign * limits)


class _Curve:
    """F_β at every cut, the strictest first, for rows that count with some weights."""

    def __init__(self, worth: Floats, valid: Mask, good: Mask, beta: float) -> None:
        self._order = np.flatnonzero(valid)[np.argsort(-worth[valid], kind="stable")]
        ordered = worth[self._order]
        self._ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        self._good, self._beta2 = good, beta * beta
        self.limits = ordered[self._ends]

    def counts(self, weights: Floats) -> tuple[Floats, Floats]:
        """How many rows each cut keeps, and how many of them are worth it."""
        own = weights[self._order]
        return np.cumsum(own)[self._ends], np.cumsum(own * self._good[self._order])[self._ends]

    def f(self, weights: Floats) -> Floats:
        """NaN where there is nothing to be found."""
        kept, found = self.counts(weights)
        whole = self._beta2 * weights[self._good].sum() + kept
        f: Floats = np.divide((1 + self._beta2) * found, whole, out=np.full(len(kept), math.nan), where=whole > 0)
        return f if weights[self._good].any() else np.full(len(kept), math.nan)


def _bootstrap(curve: _Curve, at: int, rows: int, seed: int, draws: int) -> tuple[list[int], list[float], list[float]]:
    """Of each draw its best cut's place, F_β at ``at``, and that of its best cut on the rows that it lacks."""
    best, at_best, held_out = [], [], []
    for weights in _resampled(rows, seed, draws):
        f = curve.f(weights)
        if math.isnan(f[at]):  # nothing worth keeping was drawn
            continue
        best.append(int(np.argmax(f)))
        at_best.append(float(f[at]))
        other = float(curve.f((weights == 0).astype(np.float64))[best[-1]])
        held_out += [other] if not math.isnan(other) else []
    return best, at_best, held_out


def _resampled(rows: int, seed: int, draws: int) -> Iterator[Floats]:
    """How often each row is drawn, ``rows`` times with replacement, by Philox's raw stream."""
    stream = np.random.Philox(seed)
    for _ in range(draws):
        shares = (np.asarray(stream.random_raw(rows) >> np.uint64(11), np.float64) + 0.5) * 2.0**-53
        yield np.bincount((shares * rows).astype(np.int64), minlength=rows).astype(np.float64)


def _middle(values: npt.NDArray[Any]) -> tuple[Any, Any]:
    """The ends of the middle 95 %: two of the values, the next ones outwards."""
    ordered = np.sort(values)
    last = len(ordered) - 1
    return ordered[math.floor(_TAIL * last)], ordered[math.ceil((1 - _TAIL) * last)]
