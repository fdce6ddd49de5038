"""How scores relate to each other on a sample of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from assay.report.surveying import Column, Floats

Matrix = npt.NDArray[np.float64]


def rank_correlations(scores: Mapping[str, Floats]) -> Matrix:
    """Spearman's ρ of every two scores over the rows that have both; NaN where one of them is constant or nothing."""
    return _of_pairs(list(scores.values()), _correlation)


def overlaps(scores: Mapping[str, Floats], columns: Sequence[Column]) -> Matrix:
    """Of every two scores the rows that are in the best half by both, as a share of those that are by either
    (Jaccard's index); NaN where a score is constant, or nothing. A score that is better at neither end counts as high.
    """
    signed = [scores[column.name] * np.float32(-1 if column.keep == "low" else 1) for column in columns]
    return _of_pairs(signed, _overlap)


def _of_pairs(values: Sequence[Floats], measure: Callable[[Floats, Floats], float]) -> Matrix:
    matrix = np.full((len(values), len(values)), np.nan)
    for i, one in enumerate(values):
        for j, other in enumerate(values[: i + 1]):
            both = ~np.isnan(one) & ~np.isnan(other)
            if both.sum() > 1 and np.ptp(one[both]) > 0 and np.ptp(other[both]) > 0:
                matrix[i, j] = matrix[j, i] = measure(one[both], other[both])
    return matrix


def _correlation(one: Floats, other: Floats) -> float:
    return float(np.clip(np.corrcoef(_ranks(one), _ranks(other))[0, 1], -1, 1))


def _ranks(values: Floats) -> Matrix:
    """From 0; equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Matrix = (np.cumsum(counts) - (counts + 1) / 2)[places]
    return ranks


def _overlap(one: Floats, other: Floats) -> float:
    a, b = _best_half(one), _best_half(other)
    return float((a & b).sum() / (a | b).sum())


def _best_half(values: Floats) -> npt.NDArray[np.bool_]:
    """Of equal values the earlier rows', as a selection has it."""
    best = np.zeros(len(values), bool)
    best[np.argsort(-values, kind="stable")[: (len(values) + 1) // 2]] = True
    return best
