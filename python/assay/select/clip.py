"""CLIP-powered selection's choice: the mask that maximises alignment and diversity at a given ratio. 2410.11215."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.select.rules import Amount, amount_rows, uniform
from assay.select.selection import UNSCORED, Floats, Selection, indices_mask, oriented

_STEPS = 2000
_RATE = 0.05


def clip_powered(
    table: pa.Table,
    alignment: str,
    diversity: str,
    amount: Amount,
    *,
    alpha: float = 1.0,
    beta: float | None = None,
    sgd: bool = False,
    seed: int = 0,
) -> Selection:
    """The rows that minimise −mean(m·SAS) − α mean(m·SDS) + β √((mean m − r)²) over masks m, with r N = ``amount``.

    The loss is linear in the mask but for its mean, so its minimum is found by sorting u = SAS + α·SDS: the ``amount``
    rows of the largest u, and with a finite β those beyond that have u > β, but none of u < −β.

    Args:
        table: with the columns of both scores; rows that lack one are never kept.
        alignment, diversity: their names (`methods.semantic_alignment`, `methods.sample_diversity`). Kept high.
        amount: as in `top`.
        alpha: weight of the diversity.
        beta: weight of the ratio; None: the amount is kept whatever is lost.
        sgd: the authors' way to about the same mask, to compare with: 2,000 steps of gradient descent through a rounded
            sigmoid. Needs a ``beta``. Its number of rows is near ``amount``, no more.
        seed: of the start of the descent.

    Raises:
        ValueError: infinite scores, or an option out of its range.
    """
    if not np.isfinite(alpha) or alpha < 0 or (beta is not None and not 0 <= beta < np.inf):
        raise ValueError(f"alpha={alpha}, beta={beta}: expected finite numbers of at least 0")
    if sgd and beta is None:
        raise ValueError("sgd: needs a beta, the weight of the ratio that the descent is to keep to")
    scores = [oriented(table, name, "high") for name in (alignment, diversity)]
    valid = scores[0].valid & scores[1].valid
    gain = scores[0].values.astype(np.float64) + alpha * scores[1].values.astype(np.float64)
    if not np.isfinite(gain[valid]).all():
        raise ValueError(f"{alignment!r} and {diversity!r}: infinite scores have no sum; leave those rows out first")
    rows = np.flatnonzero(valid)
    wanted = min(amount_rows(amount, table.num_rows), len(rows))
    kept = _descend(gain[rows], wanted, beta, seed) if sgd and beta is not None else _best(gain[rows], wanted, beta)
    mask = indices_mask(table.num_rows, rows[kept])
    codes = np.where(valid, mask, UNSCORED).astype(np.uint8)
    total = f"{alignment} + {alpha:g} · {diversity}"
    how = f"of the largest {total}"
    legend = (f"dropped: not {how}", f"kept: {how}", f"dropped: {total} is NaN")
    way = "" if beta is None else f", beta {beta:g}" + (f" by gradient descent, seed {seed}" if sgd else "")
    return Selection(f"{amount} {how}{way}", mask, codes, legend)


def _best(gain: Floats, wanted: int, beta: float | None) -> npt.NDArray[np.int64]:
    order = np.argsort(-gain, kind="stable")
    if beta is None:
        return order[:wanted]
    ordered = gain[order]
    return order[np.where(np.arange(len(order)) < wanted, ordered >= -beta, ordered > beta)]


def _descend(gain: Floats, wanted: int, beta: float, seed: int) -> npt.NDArray[np.int64]:
    """What the authors' descent keeps. The rounding passes gradients on as if it were not there."""
    start = uniform(len(gain), seed) - 0.5
    logits, ratio = start, wanted / max(len(gain), 1)
    for _ in range(_STEPS):
        soft = 1 / (1 + np.exp(-logits))
        excess = float(np.sign((soft > 0.5).mean() - ratio)) if len(gain) else 0.0
        logits = logits - _RATE * (beta * excess - gain) * 4 * soft * (1 - soft)
    return np.flatnonzero(logits > 0)
