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
from assay.ops._tensors import FLOATS, adjacent_columns, check_int, check_like, check_tensor, wide_dtype

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
        of queries, not from other rows or the number of threads. (The reference's products are torch's, and so are
        their bits.)

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit together, a ``k`` outside [0, N].
    """
    operands = _check(features, queries, reduce, scales)
    k = check_int("k", k)
    if not 0 <= k <= len(features):
        raise ValueError(f"k: expected at most the number of rows, N = {len(features)}, and not negative, got k = {k}")
    values, indices = _topk_scan(*operands, k, reduce == "max")
    return (values, indices) if reduce == "none" else (values[0], indices[0])


def scan_scores(features: Tensor, queries: Tensor, *, reduce: Reduce = "mean", scales: Tensor | None = None) -> Tensor:
    """All the scores that ``topk_scan`` ranks: (N,) float32, or (M, N) for ``reduce="none"``.

    Arguments and errors are those of ``topk_scan``.
    """
    scores: Tensor = _scan_scores(*_check(features, queries, reduce, scales), reduce == "max")
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


def _check(
    features: Tensor, queries: Tensor, reduce: str, scales: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Features, scales and the queries that are scanned with, in the dtype of the result; or an error."""
    check_tensor("features", features, (2,), "two dimensions, (N, d)", (*FLOATS, torch.int8))
    check_tensor("queries", queries, (2,), "two dimensions, (M, d)")
    n, d = features.shape
    if queries.shape[1] != d or len(queries) == 0 or queries.device != features.device:
        raise ValueError(
            f"queries: expected (M, d) with d = {d} of the features and M ≥ 1 on {features.device}, "
            f"got {tuple(queries.shape)} on {queries.device}"
        )
    if (scales is not None) != (features.dtype == torch.int8):
        raise ValueError(f"scales: int8 features need them and no others take them; these are {features.dtype}")
    if scales is not None:
        if not isinstance(scales, Tensor):
            raise TypeError(f"scales: expected a float32 tensor of shape ({n},), got {type(scales).__name__}")
        if scales.dtype != torch.float32 or scales.layout != torch.strided:
            raise ValueError(f"scales: expected float32 of shape ({n},), got {scales.dtype}, {scales.layout}")
        check_like("scales", scales, (n,), features.device)
        scales = scales.detach().contiguous()
    if not isinstance(reduce, str) or reduce not in REDUCTIONS:
        raise ValueError(f"reduce: expected one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    wide = wide_dtype(features, queries)
    if reduce == "mean":
        queries = queries.double().mean(0, keepdim=True)
    return features.detach(), scales, queries.detach().to(wide).contiguous()


def _nothing(queries: Tensor, maximum: bool) -> tuple[Tensor, Tensor]:
    """Values and indices of no rows."""
    shape = (1 if maximum else len(queries), 0)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


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


def _reference_scores(features: Tensor, scales: Tensor | None, queries: Tensor, maximum: bool) -> Tensor:
    parts = [scores for _, scores in _chunks(features, scales, queries, maximum)]
    return torch.cat([_nothing(queries, maximum)[0], *parts], 1)


def _cpu(features: Tensor, scales: Tensor | None, queries: Tensor, k: int, maximum: bool) -> tuple[Tensor, Tensor]:
    return _native.topk_scan(adjacent_columns(features), scales, queries, maximum, k)


def _cpu_scores(features: Tensor, scales: Tensor | None, queries: Tensor, maximum: bool) -> Tensor:
    return _native.scan(adjacent_columns(features), scales, queries, maximum)


def _triton(features: Tensor, scales: Tensor | None, queries: Tensor, k: int, maximum: bool) -> tuple[Tensor, Tensor]:
    from assay.kernels import scan as kernel

    if k == 0:
        return _nothing(queries, maximum)
    best: tuple[Tensor, Tensor] = kernel.topk_scan(features, scales, queries, k, maximum)
    return best


def _triton_scores(features: Tensor, scales: Tensor | None, queries: Tensor, maximum: bool) -> Tensor:
    from assay.kernels import scan as kernel

    scores: Tensor = kernel.scan_scores(features, scales, queries, maximum)
    return scores


@_backend.op("topk_scan", reference=reference, cpu=_cpu, triton=_triton)
def _topk_scan(
    features: Tensor, scales: Tensor | None, queries: Tensor, k: int, maximum: bool
) -> tuple[Tensor, Tensor]:
    shape = (1 if maximum else len(queries), k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


@_backend.op("scan_scores", reference=_reference_scores, cpu=_cpu_scores, triton=_triton_scores)
def _scan_scores(features: Tensor, scales: Tensor | None, queries: Tensor, maximum: bool) -> Tensor:
    return queries.new_empty(1 if maximum else len(queries), len(features))
