"""The fused output layer: statistics, gradients and losses of logits that are never stored.

Every model's hidden states and output matrix are swept once in vocabulary tiles (head_sweep). What needs the mixture of
several models takes a second sweep (head_mixture), the gradient into the network two more (head_gradient). Only partial
states reach memory, one per row and slice of the vocabulary, and they are merged in the slices' order: the same bits on
every run, and for a row whatever its neighbours are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from assay.kernels import head_sweep
from assay.kernels._common import Launch, run
from assay.kernels.fields import FIELDS, LABEL_FIELDS, has
from assay.kernels.head_launch import Kept, Merged, Models, Sketch, finish, into_network, sweep

Scores = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]


def statistics(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    labels: Tensor | None,
    share: Sequence[float],
    ignore_index: int,
    fields: int,
) -> tuple[Tensor, Tensor]:
    """(10, N) float32 statistics and (N,) predictions, as ``ops.ensemble`` defines them; checked by ops.head.

    Args:
        hidden, weight: K tensors (N, D_k) and (C, D_k), float32, bfloat16 or float16, the same for all; last stride 1.
        bias: K tensors (C,) or None.
        labels: (N,) int64 or None. One that is neither a class nor ``ignore_index`` makes its row NaN, here and below.
        share: K weights of the mixture, sum 1.
        fields: bit f set if field f is asked for. One that is not is NaN, a prediction −1.
    """
    models = Models.of(hidden, weight, bias, labels, ignore_index)
    stats, prediction = models.statistics()
    run(plan_statistics(models, share, fields, stats, prediction))
    return stats, prediction


def plan_statistics(
    models: Models, share: Sequence[float], fields: int, stats: Tensor, prediction: Tensor
) -> Iterator[Launch]:
    if models.labels is None:  # the label fields are NaN, and nothing is computed for them
        fields &= ~sum(1 << FIELDS.index(f) for f in LABEL_FIELDS)
    merged, kept = models.merged(), kept_for(fields, len(models.hidden))
    for k in range(len(models.hidden)):
        yield from sweep(models, k, merged, kept)
    yield from finish(models, merged, kept, share, fields, stats, prediction)


def scores(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    labels: Tensor,
    share: Sequence[float],
    ignore_index: int,
    fields: int,
    directions: Sequence[Tensor] | None,
    keys: Sequence[tuple[int, int]],
    rows: int | None,
) -> Scores:
    """``statistics`` and, from the same first sweep, the factors of each model's gradient (p − onehot(y)) hᵀ.

    Args:
        directions: K tensors V_k (C, D_k), last stride 1; or None. In the hidden states' dtype they run on tensor
            cores, in another all is widened to float32.
        keys: the two 32-bit words of each model's Philox key; unused without a sketch.
        rows: of the sketch; None or 0 for no sketch.

    Returns:
        stats (10, N), prediction (N,), dot (K, N) = Σ_c (p_c − [c=y]) (V_k h)_c, sqnorm (K, N) = ‖p − onehot(y)‖²,
        left (K, N, rows) = P (p − onehot(y)) / √rows; dot and left None if not asked for. 0 in ignored rows.
    """
    models = Models.of(hidden, weight, bias, labels, ignore_index)
    count, n = len(hidden), models.rows
    dot = models.empty(count, n) if directions is not None else None
    left = models.empty(count, n, rows) if rows else None
    out = (*models.statistics(), dot, models.empty(count, n), left)
    run(plan_scores(models, share, fields, directions, keys, out))
    return out


def plan_scores(
    models: Models,
    share: Sequence[float],
    fields: int,
    directions: Sequence[Tensor] | None,
    keys: Sequence[tuple[int, int]],
    out: Scores,
) -> Iterator[Launch]:
    stats, prediction, dot, sqnorm, left = out
    count, merged = len(models.hidden), models.merged()
    kept = replace(kept_for(fields, count), squares=True)
    for k in range(count):
        sketches = Sketch.of(left[k], keys[k]) if left is not None else [None]
        for sketch in sketches[1:]:  # what is over 128 rows sweeps again
            yield from sweep(models, k, merged, Kept(), sketch=sketch)
        direction = (directions[k], dot[k]) if directions is not None and dot is not None else None
        yield from sweep(models, k, merged, kept, direction, sqnorm[k], sketches[0])
    yield from finish(models, merged, kept, share, fields, stats, prediction)


def losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Per-row −log p_y (N,) and, if asked for, Wᵀ(p − onehot(y)) (N, D); float32, 0 in ignored rows.

    Rows with a NaN or +inf logit, or nothing but −inf, are NaN.
    """
    models = Models.of([hidden], [weight], [bias], labels, ignore_index)
    merged = models.merged()
    into = hidden.new_zeros(hidden.shape, dtype=torch.float32) if gradient else None
    run(plan_losses(models, merged, into))
    log_py = merged.model[0, head_sweep.LOG_PY.value]
    return torch.where(labels == ignore_index, 0.0, -log_py), into


def plan_losses(models: Models, merged: Merged, into: Tensor | None) -> Iterator[Launch]:
    yield from sweep(models, 0, merged, Kept())
    if into is not None:
        yield from into_network(models, merged, into)


def kept_for(fields: int, count: int) -> Kept:
    alone = count == 1  # one model is its own mixture
    return Kept(
        moment=has(fields, "expected_entropy") or (alone and has(fields, "entropy")),
        top=has(fields, "agreement", "vote_entropy") or (alone and has(fields, "prediction")),
        squares=alone and has(fields, "el2n"),
    )
