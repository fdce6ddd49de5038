"""How sure a few paired differences are, without a shape for their errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 6
"""Fewer differences have no interval of 95 %: all signs are alike by chance once in 2⁵ times."""


@dataclass(frozen=True)
class Interval:
    """An estimate and what it lies between."""

    estimate: float
    low: float
    high: float


def paired_interval(differences: Sequence[float], level: float = 0.95) -> Interval:
    """The Hodges–Lehmann estimate of paired differences' centre and Wilcoxon's signed-rank interval about it, exact for
    any symmetric distribution (Hollander and Wolfe, *Nonparametric Statistical Methods*, 3.2 and 3.3).

    Args:
        differences: at least `LEAST` finite numbers, independent of one another: of samples that share no row.
        level: how often such an interval holds the centre, at least.

    Raises:
        ValueError: too few of them for any interval of this level.
    """
    values = np.asarray(differences, np.float64)
    n = len(values)
    # Of the signed-rank statistic's 2ⁿ equally likely signs, how many give each value.
    counts = [1]
    for rank in range(1, n + 1):
        shifted = [0] * rank + counts
        counts = [a + b for a, b in zip(counts + [0] * rank, shifted, strict=True)]
    tail, left_out = 0, 0
    while left_out < len(counts) and (tail := tail + counts[left_out]) <= (1 - level) / 2 * 2**n:
        left_out += 1
    if not left_out:
        raise ValueError(f"differences: {n} are too few for an interval of {level:.0%}; expected at least {LEAST}")
    walsh = np.sort(((values[:, None] + values) / 2)[np.triu_indices(n)])
    return Interval(float(np.median(walsh)), float(walsh[left_out - 1]), float(walsh[-left_out]))
