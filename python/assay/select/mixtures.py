"""Rules that split a score's distribution in two and keep the better half."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from assay._lazy import require
from assay.select.rules import Keep
from assay.select.selection import Floats, OrientedScore, Selection, oriented

_FIT_ROWS = 200_000
_CHUNK_ROWS = 1 << 20


def gmm(table: pa.Table, by: str, keep: Keep | None = None, seed: int = 0) -> Selection:
    """Fit two Gaussians to the raw score and keep the rows that more likely come from the better one.

    ``weights`` are the probabilities. Beyond the two means the nearer component wins outright, so that the
    rule is a threshold: a wide component cannot claim the far tail behind a narrow one. The fit sees at most
    200,000 rows, drawn with ``seed``; infinite scores take no part in it, and ``facts`` count them.
    """
    score = oriented(table, by, keep)
    finite = _two_values(score)
    if len(finite) > _FIT_ROWS:
        finite = np.random.default_rng(seed).choice(finite, _FIT_ROWS, replace=False)
    model = require("sklearn.mixture", "cli").GaussianMixture(2, n_init=3, random_state=seed)
    center, scale = float(finite.mean()), float(finite.std())
    model.fit(((finite - center) / scale)[:, None])
    better = int(np.argmax(model.means_))
    low, high = (float(m) for m in np.sort(model.means_[:, 0]))
    weights = np.zeros(len(score.values))
    for start in range(0, len(weights), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        wide = score.values[part].astype(np.float64)
        values = (np.where(score.valid[part], wide, -np.inf) - center) / scale
        posterior = model.predict_proba(np.clip(values, low, high)[:, None])[:, better]
        weights[part] = np.select([values >= high, values <= low], [1.0, 0.0], posterior)
    means = [score.sign * (m * scale + center) for m in (high, low)]
    return score.select(
        weights > 0.5,
        f"{by}, two Gaussians",
        "of the better of two Gaussians",
        "of the worse of two Gaussians",
        threshold=_worst_kept(score, weights > 0.5),
        weights=weights,
        facts={
            "better_mean": means[0],
            "worse_mean": means[1],
            "better_share": float(model.weights_[better]),
            **_infinite(score),
        },
    )


def kmeans(table: pa.Table, by: str, keep: Keep | None = None) -> Selection:
    """Split the score into the two groups of least squared error and keep the better: exact, no seed. Infinite scores
    as in ``gmm``."""
    score = oriented(table, by, keep)
    ordered = _two_values(score)
    ordered.sort()
    split = _split(ordered)
    selection = score.cut(float(ordered[split]), f"{by}, 2-means")
    means = {"better_mean": ordered[split:].mean(), "worse_mean": ordered[:split].mean()}
    facts = {name: score.sign * float(value) for name, value in means.items()}
    return Selection(**(vars(selection) | {"facts": facts | _infinite(score)}))


def _split(ordered: Floats) -> int:
    """How many of the values, which ascend, are in the lower group."""
    rows, center = len(ordered), ordered.mean()
    total, most, split = 0.0, -np.inf, 1
    for start in range(0, rows - 1, _CHUNK_ROWS):
        held = ordered[start : start + _CHUNK_ROWS + 1]
        centered = held[: min(_CHUNK_ROWS, rows - 1 - start)] - center
        centered[0] += total
        sums = np.cumsum(centered)
        total = float(sums[-1])
        left = np.arange(start + 1, start + len(sums) + 1)
        # The split of least error is the one of greatest spread between the groups' means (the sums add up to 0).
        between = sums**2 / left + sums**2 / (rows - left)
        between[held[1 : len(sums) + 1] == held[: len(sums)]] = -1.0  # equal scores stay together
        place = int(np.argmax(between))
        if between[place] > most:
            most, split = float(between[place]), start + place + 1
    return split


def _two_values(score: OrientedScore) -> Floats:
    finite: Floats = score.values[np.isfinite(score.values)].astype(np.float64)
    if len(finite) < 2 or finite.min() == finite.max():
        raise ValueError(f"by={score.name!r} cannot be split in two; of its {len(finite)} finite scores no two differ")
    return finite


def _infinite(score: OrientedScore) -> dict[str, float]:
    """How many rows' scores are infinite, where any is: the better or worse half's, they take no part in the fit."""
    count = int(np.isinf(score.values).sum())
    return {"infinite": float(count)} if count else {}


def _worst_kept(score: OrientedScore, mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float | None:
    kept = score.values[mask & score.valid]
    return score.sign * float(kept.min()) if kept.size else None
