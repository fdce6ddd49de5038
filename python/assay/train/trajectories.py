"""Scores of a sample's whole way through training, of the table that ``Reweighter.table()`` gives.

A row of that table is a presentation: a sample (``id``), the ``step`` in which it was trained on, and scores, such as
those of ``assay.methods.Dynamics``. Presentations are ordered by step, in whatever order the rows are, and samples may
have different numbers of them. One whose score is not finite is left out, and counted. Where several processes train,
each has a table of its own presentations: ``pyarrow.concat_tables`` makes one of them.

Every function gives a table with a row per id, in the order in which ids first appear; its fields' metadata say which
end of a score to keep, as those of score tables do. ``assay.train.join`` adds it to a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay._lazy import require
from assay.methods import Column
from assay.methods.checks import check_at_least, check_one_of
from assay.train.presentations import Floats, Integers, Presentations, kept_end, presentations, table_of


def mean(table: pa.Table, by: str) -> pa.Table:
    """``mean_<by>``, the mean of a score over a sample's presentations.

    Args:
        table: ``id``, ``step`` and scores, a row per presentation.
        by: the score.

    Returns:
        ``id``, the score (float32, kept at the end that the table says), ``presentations``, ``unknown``. NaN for a
        sample of which nothing is known.

    Raises:
        ValueError: there is no such column; an id or step is missing, or a sample was presented twice in a step.
    """
    runs = presentations(table, [by])
    column = Column(f"mean_{by}", kept_end(table, by), f"mean of {by} over all presentations")
    return runs.table([column], [runs.means(runs.values[by])])


def early(table: pa.Table, by: str, *, first: int) -> pa.Table:
    """``early_<by>``, the mean of a score over a sample's first presentations.

    Of EL2N (``el2n``) or gradient lengths (``grand``, ``grad_norm``) these are the scores of *Deep Learning on a Data
    Diet*, 2107.07075, whose paper takes them in the first tenth of training and, of right labels, keeps the high end.

    Args:
        table, by: as for ``mean``.
        first: how many presentations, of those that a sample has; with one an epoch, how many epochs.

    Returns:
        As ``mean``.

    Raises:
        ValueError: as ``mean``, or ``first`` is below 1.
    """
    check_at_least("early: first", first, 1)
    runs = presentations(table, [by], first)
    column = Column(f"early_{by}", kept_end(table, by), f"mean of {by} over the first {first} presentations")
    return runs.table([column], [runs.means(runs.values[by])])


def aum(table: pa.Table, by: str = "margin") -> pa.Table:
    """``aum``, the area under the margin: the mean of z_y − max_{c≠y} z_c over training. Low is suspect.

    *Identifying Mislabeled Data using the Area Under the Margin Ranking*, 2001.10528: of logits, as
    ``assay.methods.Dynamics`` gives them. (The paper stops before the learning rate first falls, so that wrong labels
    are not learned by heart yet.)

    Args, returns, raises: as ``mean``.
    """
    runs = presentations(table, [by])
    column = Column("aum", "high", f"area under the margin: mean of {by} over training; low is suspect")
    return runs.table([column], [runs.means(runs.values[by])])


def data_map(table: pa.Table, by: str = "probability", correct: str = "correct") -> pa.Table:
    """``confidence``, ``variability`` and ``correctness``: the coordinates of *Dataset Cartography*, 2009.10795.

    The mean of p_y over training, its standard deviation (of the population: divided by the number of presentations),
    and the share of presentations at which the label was the likeliest class. Easy samples have a high confidence, hard
    ones, among them wrong labels, a low one, and ambiguous ones, of which the paper trains, a high variability.

    Args:
        table: as for ``mean``.
        by, correct: p_y, and 1 or 0. A presentation that lacks either is left out.

    Returns, raises: as ``mean``; ValueError too where ``correct`` is neither 0 nor 1.
    """
    runs = presentations(table, [by, correct])
    probability, right = runs.values[by], _is_right(runs.values[correct], correct)
    confidence = runs.means(probability)
    with np.errstate(invalid="ignore"):
        variability = np.sqrt(runs.means(np.square(probability - confidence[runs.owner])))
    columns = [
        Column("confidence", "high", f"mean of {by} over training; low is hard, or a wrong label"),
        Column("variability", "high", f"population standard deviation of {by} over training; high is ambiguous"),
        Column("correctness", "high", "share of the presentations at which the label was the likeliest class"),
    ]
    return runs.table(columns, [confidence, variability, runs.means(right)])


def forgetting(table: pa.Table, correct: str = "correct") -> pa.Table:
    """``forgetting``: how often a sample that was right is wrong the next time it comes.

    *An Empirical Study of Example Forgetting during Deep Neural Network Learning*, 1812.05159. A sample that was never
    right was never forgotten: its number is 0, like that of the easiest. So the paper sorts those behind the most
    forgotten, and ``forgetting_order`` does: it is what to select by.

    Args:
        table: as for ``mean``.
        correct: 1 or 0.

    Returns:
        As ``mean``: ``forgetting``, the number; ``never_learned``, 1 or 0; ``forgetting_order``, the number, and where
        never learned that of the presentations of the sample that has most. Keep high: what is never forgotten can go
        (and, where labels are wrong, the highest are suspect).

    Raises:
        ValueError: as ``mean``, or ``correct`` is neither 0 nor 1.
    """
    runs = presentations(table, [correct])
    right = _is_right(runs.values[correct], correct)
    lost = (right[:-1] > right[1:]) & (runs.owner[:-1] == runs.owner[1:])
    counts = np.bincount(runs.owner[:-1][lost], minlength=len(runs.ids)).astype(np.float64)
    never = np.bincount(runs.owner, weights=right, minlength=len(runs.ids)) == 0
    most = float(runs.counts.max(initial=0))
    columns = [
        Column("forgetting", "none", "times it went from right to wrong; 0 too where it was never right"),
        Column("never_learned", "none", "1 where it was never right, else 0"),
        Column("forgetting_order", "high", "forgetting, and where never right the most presentations of any sample"),
    ]
    known = np.where(runs.counts > 0, 0.0, np.nan)
    return runs.table(columns, [counts + known, never + known, np.where(never, most, counts) + known])


def loss_trajectories(
    table: pa.Table, by: str = "loss", *, missing: Literal["error", "interpolate"] = "error"
) -> tuple[pa.Array, npt.NDArray[np.float32]]:
    """Each sample's losses in the order of the steps, for ``select_by_trajectory``.

    Column t is a sample's t-th presentation: the t-th checkpoint where every sample was scored at each, and the t-th
    epoch where a trainer wrote the table.

    Args:
        table: as for ``mean``.
        by: the score.
        missing: what becomes of samples with fewer finite numbers than others: an error, or every sample's are
            interpolated at common steps, linearly between its own and beyond them by the nearest. Common are the
            table's steps where a sample has a number at each, and otherwise as many as the most presented sample has,
            evenly from the first to the last.

    Returns:
        The ids, in the order of first appearance, and (ids, T) float32.

    Raises:
        ValueError: as ``mean``; samples of fewer numbers; a sample without any.
    """
    check_one_of("loss_trajectories: missing", missing, ("error", "interpolate"))
    runs = presentations(table, [by])
    most = int(runs.counts.max(initial=0))
    whole = (runs.counts == most) & (runs.unknown == 0)
    if most == 0 or not (whole if missing == "error" else runs.counts > 0).all():
        raise ValueError(_what_is_missing(runs, whole, most, by, missing))
    if whole.all():
        return runs.ids, runs.values[by].reshape(-1, most).astype(np.float32)
    return runs.ids, _interpolated(runs, runs.values[by], most)


def select_by_trajectory(
    ids: pa.Array | Sequence[Any],
    trajectories: npt.NDArray[Any],
    count: int,
    *,
    clusters: int = 100,
    seed: int = 0,
) -> pa.Table:
    """S2L: samples whose losses fall alike teach alike, so take as many of each kind.

    *SmallToLarge (S2L): Scalable Data Selection for Fine-tuning Large Language Models by Summarizing Training
    Trajectories of Small Models*, 2403.07384, algorithm 1: k-means of the loss trajectories; then, from the smallest
    cluster to the largest, an equal share of what is still to be chosen, at random, or the whole cluster where it is
    smaller, whose remainder passes on. The same seed chooses the same samples.

    Args:
        ids: (n,), of the rows.
        trajectories: (n, T), finite.
        count: how many samples to choose, at most n.
        clusters: at most n; the paper takes 100.
        seed: of k-means and of the draws.

    Returns:
        ``id``, ``cluster`` (int64), ``selected`` (float32, 1 or 0), a row per id.

    Raises:
        ValueError: a number out of its range, a trajectory that is not finite, ids that do not match.
    """
    rows = np.asarray(trajectories)
    _check_trajectories(rows, len(ids), count, clusters)
    model = require("sklearn.cluster", "cli").KMeans(clusters, n_init=1, random_state=seed)
    with require("threadpoolctl", "cli").threadpool_limits(1):  # several threads add up in any order
        cluster = model.fit_predict(rows).astype(np.int64)
    selected = np.zeros(len(rows), dtype=np.float32)
    selected[_balanced(cluster, count, clusters, np.random.default_rng(seed))] = 1
    columns = [
        Column("cluster", "none", f"of {clusters} k-means clusters of trajectories"),
        Column("selected", "high", f"1 for {count} samples, as many of each cluster as there are; else 0"),
    ]
    return table_of(ids if isinstance(ids, pa.Array) else pa.array(list(ids)), columns, [cluster, selected])


def _is_right(values: Floats, name: str) -> Floats:
    """The values, which say right or wrong."""
    if (strange := values[(values != 0) & (values != 1)]).size:
        raise ValueError(f"trajectories: column {name!r} holds {strange[0]:g}; expected 1 (right) or 0 (wrong)")
    return values


def _what_is_missing(runs: Presentations, whole: npt.NDArray[np.bool_], most: int, by: str, missing: str) -> str:
    if most == 0:
        return f"loss_trajectories: the table has no finite {by!r}; expected one for each sample at least"
    fine = whole if missing == "error" else runs.counts > 0
    at = int(np.argmin(fine))
    what = (
        f"loss_trajectories: {int((~fine).sum())} of {len(fine)} samples have fewer than {most} finite numbers of "
        f"{by!r} or others besides, the first is {runs.ids[at].as_py()!r} with {runs.counts[at]} and "
        f"{runs.unknown[at]} that are not finite"
    )
    if missing == "error":
        return what + "; expected as many of each: pass missing='interpolate', or leave such samples out"
    return what + "; expected one at least: leave such samples out"


def _interpolated(runs: Presentations, values: Floats, most: int) -> npt.NDArray[np.float32]:
    """(n, T): every sample's values at common steps. Each has one at least."""
    own = np.unique(runs.step)
    common = own.astype(np.float64) if len(own) == most else np.linspace(own[0], own[-1], most)
    ends = np.cumsum(runs.counts)
    starts = ends - runs.counts
    found = np.empty((len(starts), most), dtype=np.float32)
    for t, step in enumerate(common):
        passed = np.add.reduceat(runs.step <= step, starts, dtype=np.int64)
        left = starts + np.maximum(passed - 1, 0)
        right = np.minimum(starts + passed, ends - 1)
        width = runs.step[right] - runs.step[left]
        share = np.clip((step - runs.step[left]) / np.maximum(width, 1), 0, 1)
        found[:, t] = values[left] + share * (values[right] - values[left])
    return found


def _check_trajectories(rows: npt.NDArray[Any], ids: int, count: int, clusters: int) -> None:
    if rows.ndim != 2 or len(rows) != ids or not rows.size:
        raise ValueError(
            f"select_by_trajectory: trajectories of shape {rows.shape} for {ids} ids; expected a row for each, (n, T)"
        )
    if (strange := np.flatnonzero(~np.isfinite(rows).all(1))).size:
        raise ValueError(f"select_by_trajectory: the trajectory in row {strange[0]} is not finite; leave it out")
    for name, value in (("count", count), ("clusters", clusters)):
        if not 1 <= value <= len(rows):
            raise ValueError(f"select_by_trajectory: {name}={value}; expected 1 to {len(rows)}, the number of samples")


def _balanced(cluster: Integers, count: int, clusters: int, rng: np.random.Generator) -> Integers:
    """``count`` rows: of each cluster, the smallest first, an equal share of what is still to come."""
    sizes = np.bincount(cluster, minlength=clusters)
    chosen: list[Integers] = []
    left = count
    for k, own in enumerate(np.argsort(sizes, kind="stable")):
        take = min(left // (clusters - k), int(sizes[own]))
        chosen.append(rng.choice(np.flatnonzero(cluster == own), take, replace=False))
        left -= take
    return np.concatenate(chosen)
