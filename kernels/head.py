"""The fused output layer: statistics, gradients and losses of logits that are never stored.

Every model's hidden states and output matrix are swept once in vocabulary tiles (head_sweep). What needs the mixture of
several models takes a second sweep (head_mixture), the gradient into the network two more (head_gradient). Only partial
states reach memory, one per row and slice of the vocabulary, and they are merged in the slices' order: the same bits on
every run, and for a row whatever its neighbours are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from assay.kernels import head_sweep
from assay.kernels.head_launch import FIELDS, Models, Sketch, Wanted, finish, has, into_network, sweep

LABEL_FIELDS = ("nll", "mean_nll", "margin", "agreement", "el2n")


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
        fields: bit f set if field f is wanted. One that is not is NaN, a prediction −1.
    """
    models = Models.of(hidden, weight, bias, labels, ignore_index)
    fields = known_fields(fields, labels)
    wanted = wanted_by(fields, len(hidden))
    known = models.known()
    for k in range(len(hidden)):
        sweep(models, k, known, wanted)
    return finish(models, known, share, fields)


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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
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
    wanted = replace(wanted_by(fields, count), squares=True)
    known = models.known()
    dot = models.empty(count, n) if directions is not None else None
    sqnorm = models.empty(count, n)
    left = models.empty(count, n, rows) if rows else None
    for k in range(count):
        sketches = Sketch.of(left[k], keys[k]) if left is not None else [None]
        for sketch in sketches[1:]:  # what is over 128 rows sweeps again
            sweep(models, k, known, Wanted(), sketch=sketch)
        direction = (directions[k], dot[k]) if directions is not None else None
        sweep(models, k, known, wanted, direction, sqnorm[k], sketches[0])
    return *finish(models, known, share, fields), dot, sqnorm, left


def losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Per-row −log p_y (N,) and, if asked for, Wᵀ(p − onehot(y)) (N, D); float32, 0 in ignored rows.

    Rows with a NaN or +inf logit, or nothing but −inf, are NaN.
    """
    models = Models.of([hidden], [weight], [bias], labels, ignore_index)
    known = models.known()
    sweep(models, 0, known, Wanted())
    log_py = known.model[0, head_sweep.LOG_PY.value]
    nll = torch.where(labels == ignore_index, 0.0, -log_py)
    return nll, into_network(models, known) if gradient else None


def known_fields(fields: int, labels: Tensor | None) -> int:
    """Without labels the label fields are NaN, and nothing is computed for them."""
    return fields if labels is not None else fields & ~sum(1 << FIELDS.index(f) for f in LABEL_FIELDS)


def wanted_by(fields: int, count: int) -> Wanted:
    alone = count == 1  # one model is its own mixture
    return Wanted(
        moment=has(fields, "expected_entropy") or (alone and has(fields, "entropy")),
        top=any(has(fields, f) for f in ("agreement", "vote_entropy")) or (alone and has(fields, "prediction")),
        squares=alone and has(fields, "el2n"),
    )
