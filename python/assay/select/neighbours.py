"""Rules that look at which rows are near one another: SemDeDup and D2 pruning.

Features are (N, D) arrays, which may be mapped from a file; of any float type, compared at length 1. Blocks of them
are widened to float32 at a time.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.select.rules import Amount, Keep, amount_rows, uniform
from assay.select.selection import DROPPED, KEPT, UNSCORED, Floats, Mask, Selection, indices_mask, oriented

Features = npt.NDArray[np.floating]
Indices = npt.NDArray[np.int64]

_ROWS = 1024  # that meet one another at once
_KMEANS_ROWS = 256  # for each cluster, of which centres are made
_KMEANS_ROUNDS = 20


def semdedup(
    features: Features,
    cosine: float = 0.95,
    *,
    worth: npt.ArrayLike | None = None,
    clusters: int | None = None,
    seed: int = 0,
) -> Selection:
    """Of rows that are nearly the same, keep one (SemDeDup, 2303.09540).

    Rows are put into clusters by k-means on the sphere. In each they are gone through from the best, and one is dropped
    if its cosine with a kept one is at least ``cosine``: every dropped row has a kept double. (The authors' code also
    drops what is near a dropped row only.) Duplicates that fall into two clusters are not found.

    Memory: blocks of 1,024 rows, 256 rows for each cluster while centres are made, and 30 bytes a row. Time: N · D ·
    clusters products to find clusters, N · D · N / clusters within them.

    Args:
        features: (N, D).
        cosine: 1 − ε of the paper; below 1, for the cosine of equal rows is rounded.
        worth: (N,), which of several to keep: the one that has most, NaN last. None: the one farthest from its
            cluster's centre, as in the paper. Ties go to the earlier row.
        clusters: None: √N.
        seed: of the k-means.

    Returns:
        Rows without a direction (0, NaN, infinite) are not kept.
    """
    if not 0 < cosine < 1:
        raise ValueError(f"cosine={cosine}: expected a number between 0 and 1")
    features, valid = _checked(features)
    priority = None if worth is None else np.asarray(worth, dtype=np.float64)
    if priority is not None and priority.shape != (len(features),):
        raise ValueError(f"worth: expected a number for each of {len(features)} rows, got shape {priority.shape}")
    codes = np.where(valid, DROPPED, UNSCORED).astype(np.uint8)
    for rows, nearness in _clusters(features, valid, clusters, seed):
        least_first = nearness if priority is None else -priority[rows]  # NaN comes last
        codes[_distinct(features, rows[np.argsort(least_first, kind="stable")], cosine)] = KEPT
    legend = (
        f"dropped: a kept row has a cosine of at least {cosine:g} with it",
        f"kept: no better row has a cosine of at least {cosine:g} with it",
        "dropped: its features have no direction",
    )
    return Selection(f"no two of a cosine of {cosine:g}, seed {seed}", codes == KEPT, codes, legend)


def d2(
    table: pa.Table,
    by: str,
    amount: Amount,
    features: Features,
    *,
    gamma: float = 1.0,
    neighbours: int = 10,
    keep: Keep | None = None,
    clusters: int = 1,
    seed: int = 0,
) -> Selection:
    """The best rows that are not next to one another (D2 pruning, 2310.07931).

    Scores are scaled to [0, 1], 1 at the end to keep. Messages first: s_i + Σ_j exp(−d_ij) s_j over i's nearest rows.
    Then the row of the largest s is taken and its own nearest rows are lowered by exp(−γ d) of that s, again and again
    until there are ``amount``; a row taken at s < 0 lowers nobody. d is the distance at length 1, in [0, 2]. A large γ
    leaves the rows of the largest messages; γ = 0 is most diverse.

    Memory: blocks of 1,024 rows, 60 · (1 + neighbours) bytes a row. Time: N · D · N products, or N · D · N / clusters
    if neighbours are only looked for in a row's own cluster (of k-means, as in ``semdedup``).

    Args:
        table: with the column ``by``.
        amount: as in `top`.
        features: (N, D), in the table's order. A row without a direction has no neighbours.
        neighbours: of each row.
        keep: the end of ``by``; None: as its column says.
        seed: of the k-means, where there are several clusters.

    Raises:
        ValueError: features of other rows, infinite scores, a number out of its range.
    """
    if not 0 <= gamma < np.inf or neighbours < 0:
        raise ValueError(
            f"gamma={gamma}, neighbours={neighbours}: expected finite numbers of at least 0; no diversity "
            "is a large gamma"
        )
    score = oriented(table, by, keep)
    features, direction = _checked(features)
    if len(features) != table.num_rows:
        raise ValueError(f"features: expected a row for each of the table's {table.num_rows}, got {len(features)}")
    worth = _unit_interval(score.values.astype(np.float64), score.valid, by)
    near, distance = _nearest(features, direction & score.valid, neighbours, clusters, seed)
    known = near >= 0
    distance = np.where(known, distance, 0)
    messages = worth + np.where(known, np.exp(-distance) * worth[near], 0).sum(1)
    wanted = min(amount_rows(amount, table.num_rows), int(score.valid.sum()))
    kept = _take(messages, score.valid, near, np.where(known, np.exp(-gamma * distance), 0), wanted)
    place = f"among {wanted:,} that are {score.end} of {by} and not next to one another"
    rule = f"{by}, {score.end} {amount} by D2 pruning, gamma {gamma:g}, {neighbours} neighbours"
    return score.select(indices_mask(table.num_rows, kept), rule, place, f"not {place}")


def _unit_interval(values: Floats, valid: Mask, by: str) -> Floats:
    found = values[valid]
    if not np.isfinite(found).all():
        raise ValueError(f"by={by!r}: infinite scores cannot be passed to neighbours; leave those rows out first")
    low, high = (float(found.min()), float(found.max())) if len(found) else (0.0, 0.0)
    if high == low:
        return valid.astype(np.float64)
    halves = 0.5 * values.astype(np.float64)  # whose differences are finite
    scaled: Floats = np.where(valid, (halves - 0.5 * low) / (0.5 * high - 0.5 * low), 0.0)
    return scaled


def _take(messages: Floats, valid: Mask, near: Indices, share: Floats, wanted: int) -> Indices:
    """The rows in the order in which they are taken. Scores only fall, so an entry that is outdated is put back."""
    current = messages.copy()
    heap = [(-float(current[row]), row) for row in np.flatnonzero(valid).tolist()]
    heapq.heapify(heap)
    taken: list[int] = []
    while len(taken) < wanted:
        value, row = heapq.heappop(heap)
        if -value != current[row]:
            heapq.heappush(heap, (-float(current[row]), row))
            continue
        taken.append(row)
        others = near[row][near[row] >= 0]
        current[others] -= share[row][near[row] >= 0] * max(float(current[row]), 0.0)
    return np.array(taken, np.int64)


def _nearest(features: Features, valid: Mask, count: int, clusters: int, seed: int) -> tuple[Indices, Floats]:
    """(N, count) other rows of the same cluster, the nearest first, -1 where there are no more; and their distances."""
    near = np.full((len(features), count), -1, np.int64)
    cosines = np.full((len(features), count), -np.inf, np.float32)
    for rows, _ in _clusters(features, valid, clusters, seed):
        for part in _parts(rows):
            own = _directions(features, part)
            for others in _parts(rows):
                found = own @ _directions(features, others).T
                found[part[:, None] == others] = -np.inf
                some = np.argsort(-found, 1)[:, :count] if count >= len(others) else _largest(found, count)
                best = np.concatenate([cosines[part], np.take_along_axis(found, some, 1)], 1)
                which = np.concatenate([near[part], others[some]], 1)
                order = np.lexsort((which, -best), axis=1)[:, :count]
                cosines[part] = np.take_along_axis(best, order, 1)
                near[part] = np.take_along_axis(which, order, 1)
    near[cosines == -np.inf] = -1
    return near, np.sqrt(np.maximum(2 - 2 * cosines.astype(np.float64), 0))


def _largest(values: npt.NDArray[np.float32], count: int) -> Indices:
    """(B, n) -> (B, count), where each row's largest are, in no order."""
    return np.argpartition(-values, count, axis=1)[:, :count]


def _distinct(features: Features, rows: Indices, cosine: float) -> Indices:
    """Of rows in order, those of which no earlier one that is kept is a double."""
    kept: list[Indices] = []
    for part in _parts(rows):
        own = _directions(features, part)
        fresh = np.ones(len(part), bool)
        for earlier in _parts(np.concatenate(kept)) if kept else ():
            fresh &= (own @ _directions(features, earlier).T).max(1) < cosine
        within = own @ own.T >= cosine
        for i in range(len(part)):
            fresh[i] &= not (within[i, :i] & fresh[:i]).any()
        kept.append(part[fresh])
    return np.concatenate(kept)


def _clusters(features: Features, valid: Mask, clusters: int | None, seed: int) -> Iterator[tuple[Indices, Floats]]:
    """Rows of each cluster that has any, and their cosines with its centre."""
    rows = np.flatnonzero(valid)
    count = round(len(rows) ** 0.5) if clusters is None else clusters
    if count < 1 and len(rows):
        raise ValueError(f"clusters={clusters}: expected at least 1")
    if not len(rows):
        return
    centres = _centres(features, rows, min(count, len(rows)), seed)
    which, nearness = np.empty(len(rows), np.int64), np.empty(len(rows))
    for start in range(0, len(rows), _ROWS):
        cosines = _directions(features, rows[start : start + _ROWS]) @ centres.T
        which[start : start + _ROWS] = cosines.argmax(1)
        nearness[start : start + _ROWS] = cosines.max(1)
    order = np.argsort(which, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
        yield rows[members], nearness[members]


def _centres(features: Features, rows: Indices, count: int, seed: int) -> npt.NDArray[np.float32]:
    """Of k-means on the sphere, over a seeded sample of the rows."""
    drawn = rows[np.sort(np.argsort(uniform(len(rows), seed), kind="stable")[: count * _KMEANS_ROWS])]
    x = np.concatenate([_directions(features, part) for part in _parts(drawn)])
    centres = x[np.argsort(uniform(len(drawn), seed + 1), kind="stable")[:count]]
    which = np.full(len(x), -1)
    for _ in range(_KMEANS_ROUNDS):
        before = which
        which = np.concatenate([(x[part] @ centres.T).argmax(1) for part in _parts(np.arange(len(x)))])
        if (which == before).all():
            break
        order = np.argsort(which, kind="stable")
        starts = np.flatnonzero(np.diff(which[order], prepend=-1))
        sums = np.add.reduceat(x[order], starts, dtype=np.float64)
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = centres.copy()  # one that has no rows stays where it is
        centres[which[order[starts]]] = sums / np.maximum(length, 1e-300)
    return centres


def _checked(features: Features) -> tuple[Features, Mask]:
    """The features, and which rows have a direction."""
    features = np.asanyarray(features)
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise ValueError(f"features: expected floats of shape (N, D), got {features.dtype} {features.shape}")
    parts = _parts(np.arange(len(features)))
    valid = [np.isfinite(_directions(features, part)).all(1) for part in parts]
    return features, np.concatenate(valid) if valid and features.shape[1] else np.zeros(len(features), bool)


def _directions(features: Features, rows: Indices) -> npt.NDArray[np.float32]:
    """Some rows at length 1, float32; NaN of those that have no direction."""
    with np.errstate(divide="ignore", invalid="ignore"):
        wide = features[rows].astype(np.float64)
        wide /= np.abs(wide).max(1, keepdims=True, initial=0)
        unit: npt.NDArray[np.float32] = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)
        return unit


def _parts(rows: Indices) -> list[Indices]:
    return [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]
