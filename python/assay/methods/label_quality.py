"""Label-quality scores of classifiers' predictions: per model, then averaged over models.

The scores and the weighting schemes are cleanlab's (Northcutt, Jiang & Chuang, 1911.00068; the ensemble form of Kuan &
Mueller, "Model-agnostic label quality scoring", 2022), and equal its numbers; they are computed from
``ops.ensemble_stats`` without a probability matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from assay import ops
from assay.methods.base import Column

Weighting = Literal["uniform", "accuracy", "log_loss"]

# cleanlab's constants: the floor under a probability, and the exponents tried for log-loss weights.
FLOOR = 1e-6
LOG_LOSS_EXPONENTS = (1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2, 2e2)

COLUMNS = (
    Column("self_confidence", "high", "Σ_k w_k p_k,y: the models' own probability of the label"),
    Column("normalized_margin", "high", "Σ_k w_k (p_k,y − max_{c≠y} p_k,c + 1)/2"),
    Column(
        "confidence_weighted_entropy",
        "high",
        "Σ_k w_k log(1+x_k)/x_k with x_k = H(p_k)/(log C · p_k,y): entropy against self-confidence",
    ),
)


def label_quality(
    logits: Sequence[Tensor], labels: Tensor, weights: Sequence[float] | Weighting = "uniform"
) -> dict[str, Tensor]:
    """Three scores per row in [0, 1], high where the label looks right.

    Args:
        logits: K tensors (N, C), as for ``ops.ensemble_stats``. Out-of-fold ones (``retrain.out_of_fold``), if the models were
            trained on these labels: in-sample predictions have learned the wrong labels too.
        labels: (N,) int64; rows at −100 are NaN.
        weights: one per model, or how to find them: see ``model_weights``.

    Returns:
        ``self_confidence``, ``normalized_margin``, ``confidence_weighted_entropy``, each (N,) float32.
    """
    shares = model_weights(logits, labels, weights) if isinstance(weights, str) else list(weights)
    if len(shares) != len(logits):
        raise ValueError(f"weights: expected one per model, {len(logits)}, got {len(shares)}")
    total = math.fsum(shares)
    scores = {column.name: torch.zeros(len(labels), device=labels.device) for column in COLUMNS}
    for z, share in zip(logits, shares, strict=True):
        stats = ops.ensemble_stats([z], labels, fields=("nll", "margin", "entropy"))
        assert stats.nll is not None
        assert stats.margin is not None
        assert stats.entropy is not None
        p = (-stats.nll).exp()
        x = stats.entropy / math.log(max(2, z.shape[1])) / p.clamp(min=FLOOR)
        per_model = (p, (stats.margin + 1) / 2, torch.log1p(x) / x.clamp(min=FLOOR))
        for column, value in zip(COLUMNS, per_model, strict=True):
            scores[column.name] += share / total * value
    return scores


def model_weights(logits: Sequence[Tensor], labels: Tensor, by: Weighting) -> list[float]:
    """One weight per model, summing to 1, from how well it predicts the given labels.

    ``uniform``; ``accuracy``: in proportion to accuracy; ``log_loss``: in proportion to exp(−t · log loss), with the t
    of ``LOG_LOSS_EXPONENTS`` whose average of probabilities has the lowest log loss.
    """
    if by == "uniform":
        return [1 / len(logits)] * len(logits)
    seen = labels >= 0
    y = labels[seen]
    if not len(y):
        raise ValueError(f"weights={by!r} need labelled rows to fit on; got none")
    if by == "accuracy":
        accuracy = [float((z[seen].argmax(1) == y).double().mean()) for z in logits]
        return _shares(accuracy)
    if by != "log_loss":
        raise ValueError(f"weights: expected 'uniform', 'accuracy', 'log_loss' or one number per model, got {by!r}")
    probabilities = [z[seen].double().softmax(1) for z in logits]
    losses = []
    for p in probabilities:
        p = p.clamp(min=FLOOR)
        losses.append(_log_loss(p / p.sum(1, keepdim=True), y))
    tried = [_shares([math.exp(-t * (loss - min(losses))) for loss in losses]) for t in LOG_LOSS_EXPONENTS]
    mixtures = [sum(w * p for w, p in zip(shares, probabilities, strict=True)) for shares in tried]
    quality = [_log_loss(torch.as_tensor(mixture), y) for mixture in mixtures]
    return tried[quality.index(min(quality))]


def _shares(values: Sequence[float]) -> list[float]:
    total = math.fsum(values)
    return [v / total for v in values] if total > 0 else [1 / len(values)] * len(values)


def _log_loss(p: Tensor, y: Tensor) -> float:
    tiny = torch.finfo(p.dtype).eps
    return float(-p.gather(1, y[:, None]).clamp(min=tiny).log().mean())
