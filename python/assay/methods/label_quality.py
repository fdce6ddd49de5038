"""Label-quality scores of classifiers' predictions: per model, then averaged over models.

The scores and the weighting schemes are cleanlab's (Northcutt, Jiang & Chuang, 1911.00068; the ensemble form of Kuan &
Mueller, "Model-agnostic label quality scoring", 2022), and equal its numbers wherever cleanlab keeps to its formulas.
Its floor of 1e-6 under p_y, under x and under the probabilities of a log loss is not copied: it makes
log(1 + x)/x fall to 0 as x does, where the limit is 1, so that the surest right labels rank below the surest wrong
ones.

The formulas are ``_scores``, in float64. Most rows of float32 and narrower logits come to the same numbers, within
1e-6, by a shorter way: from three statistics of ``ops.ensemble_stats``, which reads the logits once. ``_sharp`` says
which rows do not, and why. Logits in float64 and adjusted scores, which need all of p, take the formulas throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from assay import ops
from assay.methods.base import Column
from assay.methods.weights import shares
from assay.ops.ensemble import check_labels, check_logits, check_range
from assay.tasks import IGNORE

Weighting = Literal["uniform", "accuracy", "log_loss"]

# The exponents tried for log-loss weights, as in cleanlab.
LOG_LOSS_EXPONENTS = (1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2, 2e2)
# The threshold of a class that labels no row, as in cleanlab: above every probability, so that it is nobody's rival.
UNSEEN_CLASS = 2.0
# Where statistics in float32 are precise enough: see ``_sharp``. Nats.
_SURE_NLL, _FLAT_ENTROPY, _FAR_NLL = 0.7, 0.25, 80.0
# Numbers of logits, all models', that are scored at a time: a copy of so many is made of several models.
_BLOCK = 1 << 20
# Numbers of logits that are in float64 at a time: few enough for the cache.
_CHUNK = 1 << 15

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
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    weights: Sequence[float] | Tensor | Weighting = "uniform",
    *,
    adjust_pred_probs: bool = False,
) -> dict[str, Tensor]:
    """Three scores per row in [0, 1], high where the label looks right.

    Args:
        logits: (K, N, C) or K tensors (N, C), as for ``ops.ensemble_stats``; log-probabilities are logits too.
            Out-of-fold ones (``retrain.out_of_fold``), if the models were trained on these labels: in-sample
            predictions have learned the wrong labels too.
        labels: (N,) int64; rows at −100 are NaN, as are rows with a NaN or +inf logit.
        weights: one per model, or how to find them: see ``model_weights``.
        adjust_pred_probs: against class imbalance, take off each class's mean self-confidence t_c (over the rows
            labelled c, per model) first: p_c becomes (p_c − t_c + max t) / Σ_c (p_c − t_c + max t).

    Returns:
        ``self_confidence``, ``normalized_margin``, ``confidence_weighted_entropy``, each (N,) float32. The last has
        no adjusted form and is left out with ``adjust_pred_probs``.

    Raises:
        TypeError, ValueError, IndexError: no logits, shapes that differ, labels outside [0, C), or weights that are
            not one finite number ≥ 0 per model with a positive sum.
    """
    models, labels = _tensors(logits, labels)
    share = model_weights(models, labels, weights) if isinstance(weights, str) else shares(weights, len(models))
    scores = (_adjusted if adjust_pred_probs else _unadjusted)(models, labels, share).float()
    return {column.name: row for column, row in zip(COLUMNS[: len(scores)], scores, strict=True)}


def model_weights(logits: Tensor | Sequence[Tensor], labels: Tensor, by: Weighting) -> list[float]:
    """One weight per model, summing to 1, from how well it predicts the given labels.

    ``uniform``; ``accuracy``: in proportion to accuracy; ``log_loss``: in proportion to exp(−t · log loss), with the t
    of ``LOG_LOSS_EXPONENTS`` whose average of probabilities has the lowest log loss. A model that gives a label
    probability 0 has an infinite log loss and weight 0. Rows that ``label_quality`` leaves NaN have no say.

    Raises:
        ValueError: an unknown name, nothing to fit on, or models that are all at the worst possible value.
    """
    models, labels = _tensors(logits, labels)
    if by == "uniform":
        return shares(None, len(models))
    if by not in ("accuracy", "log_loss"):
        raise ValueError(f"weights: expected 'uniform', 'accuracy', 'log_loss' or one number per model, got {by!r}")
    seen = _defined(models, labels)
    if not bool(seen.any()):
        raise ValueError(f"weights={by!r} need labelled rows to fit on; got none")
    if by == "accuracy":
        accuracy = [float((z[seen].argmax(1) == labels[seen]).double().mean()) for z in models]
        if not any(accuracy):
            raise ValueError("weights='accuracy': no model predicts a single label right; use 'uniform' or 'log_loss'")
        return shares(accuracy, len(models))
    own = torch.stack([torch.cat([_own(part, y) for part, y in _chunks(z, labels)])[seen] for z in models])
    losses = -own.mean(1)
    if bool(losses.isinf().all()):
        raise ValueError(
            "weights='log_loss': every model gives some label probability 0, which is an infinite loss; use 'uniform' "
            "or 'accuracy', or put a floor under the logits"
        )
    tried = [shares((-t * (losses - losses.min())).exp(), len(models)) for t in LOG_LOSS_EXPONENTS]
    mixtures = [(own + own.new_tensor(weights).log()[:, None]).logsumexp(0) for weights in tried]
    quality = [float(-mixture.mean()) for mixture in mixtures]
    return tried[quality.index(min(quality))]


def _tensors(logits: Any, labels: Any) -> tuple[list[Tensor], Tensor]:
    """K logits and the labels as tensors (NumPy arrays and lists are taken), checked."""
    whole = isinstance(logits, Tensor) and logits.ndim == 2
    if not whole and not hasattr(logits, "__len__"):
        raise TypeError(f"logits: expected (K, N, C) or K tensors (N, C), got {type(logits).__name__}")
    models = [_tensor(z, f"logits[{k}]") for k, z in enumerate([logits] if whole else logits)]
    models = check_logits(models)
    n, c = models[0].shape
    y = check_labels(_tensor(labels, "labels"), n, models[0].device, needed=True)
    assert y is not None
    check_range(y, c, IGNORE)
    return models, y


def _tensor(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}") from None


def _defined(models: list[Tensor], labels: Tensor) -> Tensor:
    """(N,) bool: rows with a label and logits that make probabilities."""
    nll = ops.ensemble_stats(models, labels, fields=("nll",)).nll
    assert nll is not None
    return ~nll.isnan()


def _chunks(z: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time: (n, C) logits in float64 and (n,) labels, any label where there is none."""
    rows = max(1, _CHUNK // z.shape[1])
    for start in range(0, max(1, len(z)), rows):
        yield z[start : start + rows].double(), labels[start : start + rows].clamp(min=0)


def _adjusted(models: list[Tensor], labels: Tensor, share: list[float]) -> Tensor:
    """(2, N) float64: the first two scores, adjusted and averaged."""
    defined = _defined(models, labels)
    total = torch.zeros(2, len(labels), dtype=torch.float64, device=labels.device)
    for z, weight in zip(models, share, strict=True):
        total += weight * _formulas(z, labels, _thresholds(z, labels, defined))[:2]
    return total.masked_fill(~defined, torch.nan)


def _unadjusted(models: list[Tensor], labels: Tensor, share: list[float]) -> Tensor:
    """(3, N) float64: the scores, averaged; a block of rows at a time, all models' together."""
    weights = torch.tensor(share, dtype=torch.float64, device=labels.device)[:, None]
    rows = max(1, _BLOCK // (len(models) * models[0].shape[1]))
    parts = []
    for start in range(0, max(1, len(labels)), rows):
        block = [z[start : start + rows] for z in models]
        z = torch.cat(block) if len(block) > 1 else block[0]
        scores = _rows(z, labels[start : start + rows].repeat(len(models)))
        parts.append((weights * scores.view(3, len(models), len(block[0]))).sum(1))
    return torch.cat(parts, 1)


def _rows(z: Tensor, y: Tensor) -> Tensor:
    """(3, n) float64: scores per row, from its statistics where those are precise enough; NaN where undefined."""
    if z.dtype == torch.float64:
        undefined = ~z.amax(1).isfinite() | (y == IGNORE)
        return _formulas(z, y).masked_fill(undefined, torch.nan)
    stats = ops.ensemble_stats([z], y, fields=("nll", "margin", "entropy"))
    nll, margin, entropy = (getattr(stats, field).double() for field in ("nll", "margin", "entropy"))
    confidence = (-nll).exp()
    x = (entropy / (confidence * math.log(max(2, z.shape[1])))).clamp(min=1e-300)
    scores = torch.stack([confidence, (margin + 1) / 2, torch.log1p(x) / x])
    sharp = _sharp(nll, entropy).nonzero()[:, 0]
    if len(sharp):
        scores[:, sharp] = _formulas(z[sharp], y[sharp])
    return scores


def _formulas(z: Tensor, labels: Tensor, thresholds: Tensor | None = None) -> Tensor:
    """``_scores`` of any number of rows, in any precision."""
    return torch.cat([_scores(part, y, thresholds) for part, y in _chunks(z, labels)], 1)


def _sharp(nll: Tensor, entropy: Tensor) -> Tensor:
    """(N,) bool: rows whose scores float32 statistics do not give to six digits; they take ``_scores``.

    An entropy has an absolute error, about 1e-7, and x = H/(log C · p_y) scales it by 1/p_y. Where p_y > e^{−.7} that
    is nothing; where H > .25 it is relative, and passes to log(1+x)/x as it is. What remains are rows that are sure of
    another class. −log p_y has a relative error, and so p_y one that grows with it: above 80 it is 5e-6 and more.
    """
    return (nll >= _SURE_NLL) & ~((entropy > _FLAT_ENTROPY) & (nll < _FAR_NLL))  # not where nll is NaN


def _own(z: Tensor, y: Tensor) -> Tensor:
    """log p_y, (n,)."""
    return z.log_softmax(1).gather(1, y[:, None])[:, 0]


def _thresholds(z: Tensor, labels: Tensor, defined: Tensor) -> Tensor:
    """(C,) float64: the mean probability of class c over the rows labelled c."""
    own = torch.cat([_own(part, y) for part, y in _chunks(z, labels)])[defined].exp()
    y = labels[defined]
    sums = own.new_zeros(z.shape[1]).index_add_(0, y, own)
    counts = torch.bincount(y, minlength=z.shape[1])
    return torch.where(counts > 0, sums / counts, UNSEEN_CLASS)


def _scores(z: Tensor, y: Tensor, thresholds: Tensor | None) -> Tensor:
    """(3, n) float64: one model's scores, the first two adjusted if there are thresholds.

    With d_c = z_c − max z and r = Σ e^{d_c} over all but one largest, H (1 + r) = (1 + r) log(1 + r) − Σ e^{d_c} d_c
    and x = H (1 + r) e^{−d_y} / log C: no term is negative, so that nothing cancels where p is nearly one-hot.
    """
    top = z.argmax(1, keepdim=True)
    lead = z - z.gather(1, top)
    e = lead.exp()
    r = e.scatter(1, top, 0.0).sum(1)
    own = lead.gather(1, y[:, None])[:, 0]
    entropy = (1 + r) * torch.log1p(r) - (e * lead.clamp(min=-800)).sum(1)  # e is 0 below −800
    x = (entropy * (-own.clamp(min=-600)).exp() / math.log(max(2, z.shape[1]))).clamp(min=1e-300)
    p = e / (1 + r)[:, None]
    if bool((extreme := own < -600).any()):
        x[extreme] = _entropy_by_confidence(lead[extreme], top[extreme], own[extreme])
    if thresholds is not None:
        p = p - thresholds + thresholds.max()
        p = p / p.sum(1, keepdim=True)
    confidence = p.gather(1, y[:, None])[:, 0]
    rival = p.scatter(1, y[:, None], 0.0).amax(1)  # 0 where there is one class; no probability is below
    return torch.stack([confidence, (confidence - rival + 1) / 2, torch.log1p(x) / x])


def _entropy_by_confidence(lead: Tensor, top: Tensor, own: Tensor) -> Tensor:
    """x of rows whose label has a probability below float64's, at most 1e300, where log(1+x)/x is 0 to the last bit.

    The same sum in logarithms, as Σ e^{d_c} (f − d_c) over all but the largest, f = (1 + r) log(1 + r)/r.
    """
    rest = lead.scatter(1, top, -math.inf)
    r = rest.logsumexp(1, keepdim=True).exp().clamp(min=1e-300)
    f = (1 + r) * torch.log1p(r) / r
    log_x = (rest - own[:, None] + (f - rest.clamp(min=-1e300)).log()).logsumexp(1)
    log_x -= math.log(math.log(max(2, lead.shape[1])))
    return log_x.masked_fill(own == -math.inf, math.inf).clamp(max=690).exp()  # −∞: a label ruled out
