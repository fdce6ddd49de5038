"""Inner products of a corpus's features with a few queries, and the rows with the largest: one read of the features.

Rows are ranked by score, the larger first; equal scores by index, the lower first; NaN after everything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from assay.ops import _backend, _native

Reduce = Literal["mean", "max", "none"]
REDUCTIONS = ("mean", "max", "none")

# The reference makes this many scores at a time, so that N × M are never there at once.
CHUNK_SCORES = 1 << 22


def topk_scan(
    features: Tensor, queries: Tensor, k: int, *, reduce: Reduce = "mean", scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows with the largest inner products ⟨features_i, queries_m⟩, reduced over the queries.

    The features are read once whatever M is, and of their scores only the best are kept.

    Args:
        features: (N, d) float32, bfloat16 or float16 (float64 runs the reference), or int8 with ``scales``. Rows with
            any stride; where columns are not adjacent, a copy is made. Not differentiated.
        queries: (M, d), M ≥ 1, of any float dtype.
        k: at most N.
        reduce: ``"mean"`` or ``"max"`` over the queries, or ``"none"``: every query gets a ranking of its own. The mean
            of the scores is the score of the mean: it costs what one query costs.
        scales: (N,) float32, for int8 features only: row i stands for scales[i] · features[i].

    Returns:
        values (k,) float32 and indices (k,) int64, best first; (M, k) each for ``"none"``. Of equal scores the lower
        index comes first. A NaN score (for ``"max"``: of any query) ranks behind −inf: it is among the k only where
        fewer than k other rows are. Sums are float32 in blocks; the bits follow from the row, the query and the number
        of queries, not from other rows or the number of threads.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit together, a ``k`` outside [0, N].
    """
    queries = _check(features, queries, reduce, scales)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an int, got {k!r}")
    if not 0 <= k <= len(features):
        raise ValueError(f"k: expected at most the number of rows, N = {len(features)}, and not negative, got k = {k}")
    values, indices = _topk_scan(features.detach(), scales, queries, k, reduce == "max")
    return (values, indices) if reduce == "none" else (values[0], indices[0])


def scan_scores(features: Tensor, queries: Tensor, *, reduce: Reduce = "mean", scales: Tensor | None = None) -> Tensor:
    """All the scores that ``topk_scan`` ranks: (N,) float32, or (M, N) for ``reduce="none"``.

    Arguments and errors are those of ``topk_scan``.
    """
    queries = _check(features, queries, reduce, scales)
    scores: Tensor = _scan_scores(features.detach(), scales, queries, reduce == "max")
    return scores if reduce == "none" else scores[0]


def merge_topk(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best of candidates (…, n) by the order of ``topk_scan``, best first.

    Equal values must stand in the order of their indices, as they do where results of consecutive parts of the features
    are put behind one another.
    """
    nan = values.isnan()
    order = values.masked_fill(nan, -math.inf).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, nan.gather(-1, order).int().argsort(dim=-1, stable=True))[..., :k]
    return values.gather(-1, order), indices.gather(-1, order)


def _check(features: Tensor, queries: Tensor, reduce: str, scales: Tensor | None) -> Tensor:
    """The queries that are scanned with, contiguous, in the dtype of the result; or an error."""
    for name, x in (("features", features), ("queries", queries)):
        if x.dim() != 2:
            raise ValueError(f"{name}: expected two dimensions, (rows, d), got shape {tuple(x.shape)}")
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if features.dtype not in (*floats, torch.int8):
        raise TypeError(f"features: expected float32, bfloat16, float16 or int8, got {features.dtype}")
    if queries.dtype not in floats:
        raise TypeError(f"queries: expected float32, bfloat16 or float16, got {queries.dtype}")
    n, d = features.shape
    if queries.shape[1] != d or len(queries) == 0 or queries.device != features.device:
        raise ValueError(
            f"queries: expected (M, d) with d = {d} of the features and M ≥ 1 on {features.device}, "
            f"got {tuple(queries.shape)} on {queries.device}"
        )
    if (scales is not None) != (features.dtype == torch.int8):
        raise ValueError(f"scales: int8 features need them and no others take them; these are {features.dtype}")
    if scales is not None and (
        scales.dtype != torch.float32 or scales.shape != (n,) or scales.device != features.device
    ):
        raise ValueError(
            f"scales: expected float32 of shape ({n},) on {features.device}, "
            f"got {scales.dtype} of shape {tuple(scales.shape)} on {scales.device}"
        )
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce: expected one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    wide = torch.float64 if torch.float64 in (features.dtype, queries.dtype) else torch.float32
    if reduce == "mean":
        queries = queries.double().mean(0, keepdim=True)
    return queries.detach().to(wide).contiguous()


@_backend.custom_op("assay::topk_scan")
def _topk_scan(
    features: Tensor, scales: Tensor | None, queries: Tensor, k: int, maximum: bool
) -> tuple[Tensor, Tensor]:
    backend = _backend.choose("topk_scan", queries, "triton")
    if backend == "reference":
        return reference(features, scales, queries, k, maximum)
    if backend == "cpu":
        return _native.topk_scan(_adjacent(features), _contiguous(scales), queries, maximum, k)
    if k == 0:
        return _nothing(queries, maximum)
    from assay.kernels import scan as kernel

    best: tuple[Tensor, Tensor] = kernel.topk_scan(features, _contiguous(scales), queries, k, maximum)
    return best


@_topk_scan.register_fake
def _(features: Tensor, scales: Tensor | None, queries: Tensor, k: int, maximum: bool) -> tuple[Tensor, Tensor]:
    shape = (1 if maximum else len(queries), k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


@_backend.custom_op("assay::scan_scores")
def _scan_scores(features: Tensor, scales: Tensor | None, queries: Tensor, maximum: bool) -> Tensor:
    backend = _backend.choose("scan_scores", queries, "triton")
    if backend == "reference" or len(features) == 0:
        parts = [scores for _, scores in _chunks(features, scales, queries, maximum)]
        return torch.cat([_nothing(queries, maximum)[0], *parts], 1)
    if backend == "cpu":
        return _native.scan(_adjacent(features), _contiguous(scales), queries, maximum)
    from assay.kernels import scan as kernel

    scores: Tensor = kernel.scan_scores(features, _contiguous(scales), queries, maximum)
    return scores


@_scan_scores.register_fake
def _(features: Tensor, scales: Tensor | None, queries: Tensor, maximum: bool) -> Tensor:
    return queries.new_empty(1 if maximum else len(queries), len(features))


def _nothing(queries: Tensor, maximum: bool) -> tuple[Tensor, Tensor]:
    """Values and indices of no rows."""
    shape = (1 if maximum else len(queries), 0)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


def _adjacent(features: Tensor) -> Tensor:
    return features if features.stride(1) == 1 else features.contiguous()


def _contiguous(scales: Tensor | None) -> Tensor | None:
    return None if scales is None else scales.contiguous()


def reference(features: Tensor, scales: Tensor | None, queries: Tensor, k: int, maximum: bool) -> tuple[Tensor, Tensor]:
    """The same in plain torch and in the dtype of the queries, by chunks of rows."""
    values, indices = _nothing(queries, maximum)
    for start, scores in _chunks(features, scales, queries, maximum):
        rows = torch.arange(start, start + scores.shape[1], device=scores.device).expand_as(scores)
        values, indices = merge_topk(torch.cat([values, scores], 1), torch.cat([indices, rows], 1), k)
    return values, indices


def _chunks(features: Tensor, scales: Tensor | None, queries: Tensor, maximum: bool) -> Iterator[tuple[int, Tensor]]:
    """First row and scores (columns, rows) of every chunk."""
    step = max(1, CHUNK_SCORES // max(queries.shape))
    for start in range(0, len(features), step):
        scores = queries @ features[start : start + step].to(queries.dtype).T
        if scales is not None:
            scores = scores * scales[start : start + step]
        yield start, scores.amax(0, keepdim=True) if maximum else scores
