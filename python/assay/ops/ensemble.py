"""Statistics of an ensemble's logits against the label: loss, agreement and uncertainty, one read of the logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from assay.kernels.fields import FIELDS as FIELDS
from assay.kernels.fields import LABEL_FIELDS as LABEL_FIELDS
from assay.ops import _backend, _cuda, _native
from assay.ops._tensors import check_int, check_matrices, wide_dtype


@dataclass(frozen=True)
class EnsembleStats:
    """(N,) tensors; with p_k = softmax(z_k) and p̄ = Σ_k w_k p_k. A field that was not asked for is None.

    Rows that are ignored, and rows with a NaN or +inf logit or nothing but −inf, are NaN (``prediction`` −1).
    """

    nll: Tensor | None = None  #: −log p̄_y, nats
    mean_nll: Tensor | None = None  #: −Σ_k w_k log p_k,y, nats; ≥ nll
    margin: Tensor | None = None  #: p̄_y − max_{c≠y} p̄_c, in [−1, 1]
    agreement: Tensor | None = None  #: Σ_k w_k [argmax z_k = y], in [0, 1]
    el2n: Tensor | None = None  #: ‖p̄ − onehot(y)‖₂, in [0, √2] (2107.07075, of the mixture)
    entropy: Tensor | None = None  #: H(p̄), nats
    expected_entropy: Tensor | None = None  #: Σ_k w_k H(p_k), nats
    mutual_information: Tensor | None = None  #: Σ_k w_k KL(p_k‖p̄) = entropy − expected_entropy (BALD), nats; ≥ 0
    confidence: Tensor | None = None  #: max_c p̄_c
    vote_entropy: Tensor | None = None  #: H(Σ_k w_k onehot(argmax z_k)), nats
    prediction: Tensor | None = None  #: argmax_c p̄_c, int64, the lowest index on ties


def ensemble_stats(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    weights: Tensor | Sequence[float] | None = None,
    ignore_index: int = -100,
    fields: Iterable[str] | None = None,
) -> EnsembleStats:
    """Statistics of K models' logits, per row.

    Args:
        logits: (K, N, C), or K tensors (N, C); float32, bfloat16 or float16 (float64 runs the reference), any strides.
            −inf means probability zero. Not differentiated.
        labels: (N,) int64 in [0, C) or ``ignore_index``. Without labels the label fields are NaN.
        weights: (K,), not negative, of the models in the mixture; scaled to sum to 1. None: equal.
        ignore_index: rows with this label are NaN in every field; they are not read.
        fields: the names wanted, None for all. What is not asked for is None in the result.

    Returns:
        ``EnsembleStats`` of float32 (N,) tensors on the logits' device (float64 for float64 logits), accumulated in
        float32 or wider, with the same bits on every run and any number of threads (the reference's sums are torch's).

    Raises:
        TypeError, ValueError: a shape, dtype, device, weight or field is wrong.
        IndexError: a label outside [0, C); not while a CUDA graph is captured, where such a row becomes NaN.
    """
    models = check_logits(logits)
    labels = check_labels(labels, len(models[0]), models[0].device)
    weights = check_weights(weights, len(models))
    mask, ignore_index = check_fields(fields), check_int("ignore_index", ignore_index)
    stats, prediction = _ensemble_stats(models, labels, weights, ignore_index, mask)
    return pack_stats(stats, prediction, mask)


def pack_stats(stats: Tensor, prediction: Tensor, mask: int) -> EnsembleStats:
    """(10, N) statistics and (N,) predictions -> the fields of ``mask``, by name."""
    values = [*stats.unbind(0), prediction]
    return EnsembleStats(**{f: v for i, (f, v) in enumerate(zip(FIELDS, values, strict=True)) if mask >> i & 1})


def check_labels(labels: Tensor | None, n: int, device: torch.device, needed: bool = False) -> Tensor | None:
    """The labels detached, or an error; their values are checked by ``check_range``."""
    if labels is None and not needed:
        return None
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected an int64 tensor of shape ({n},), got {type(labels).__name__}")
    if labels.layout != torch.strided or labels.dtype != torch.int64 or labels.shape != (n,) or labels.device != device:
        raise TypeError(
            f"labels: expected int64 of shape ({n},) on {device}, "
            f"got {labels.dtype} of shape {tuple(labels.shape)} on {labels.device}"
        )
    return labels.detach()


def check_weights(weights: Tensor | Sequence[float] | None, models: int, name: str = "weights") -> Tensor | None:
    """(K,) float64 on the CPU."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        try:
            weights = torch.tensor([float(w) for w in weights], dtype=torch.float64)
        except (TypeError, ValueError):
            raise TypeError(f"{name}: expected one number per model, {models}, got {weights!r:.100}") from None
    if weights.is_complex() or weights.is_meta or weights.layout != torch.strided:
        raise TypeError(f"{name}: expected real numbers, got {weights.dtype} on {weights.device}, {weights.layout}")
    weights = weights.detach().to("cpu", torch.float64)
    if weights.shape != (models,):
        raise ValueError(f"{name}: expected one per model, shape ({models},), got {tuple(weights.shape)}")
    return weights


def check_logits(logits: Tensor | Sequence[Tensor]) -> list[Tensor]:
    models = check_matrices("logits", logits, "N, C")
    first = models[0]
    for k, z in enumerate(models):
        if z.shape != first.shape:
            raise ValueError(
                f"logits[{k}]: expected the shape of logits[0], (N, C) = {tuple(first.shape)}, got {tuple(z.shape)}"
            )
    if first.shape[1] == 0:
        raise ValueError("logits: expected at least one class, got shape " + str(tuple(first.shape)))
    widest = reduce(torch.promote_types, [z.dtype for z in models])  # models of different precision
    return [z.to(widest) for z in models]


def check_fields(fields: Iterable[str] | None) -> int:
    if fields is None:
        return (1 << len(FIELDS)) - 1
    if isinstance(fields, str):
        raise TypeError(f"fields: expected a collection of names, got the string {fields!r}; write [{fields!r}]")
    if not isinstance(fields, Iterable):
        raise TypeError(f"fields: expected a collection of names, got {type(fields).__name__}")
    mask = 0
    for name in fields:
        if not isinstance(name, str) or name not in FIELDS:
            raise ValueError(f"fields: unknown field {name!r}; expected some of {', '.join(FIELDS)}")
        mask |= 1 << FIELDS.index(name)
    return mask


def check_range(labels: Tensor | None, c: int, ignore_index: int) -> None:
    """Raise IndexError for a label that is neither in [0, c) nor ``ignore_index``.

    Not while a CUDA graph is captured, which must not wait for the device: kernels then make such a row NaN.
    """
    if labels is None or not labels.numel():
        return
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = torch.stack(torch.aminmax(labels)).tolist()  # the device is waited for once
    if low < 0 or high >= c:
        wrong = ((labels < 0) | (labels >= c)) & (labels != ignore_index)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise IndexError(
                f"labels: expected values in [0, {c}) or ignore_index={ignore_index}, "
                f"got {int(labels[row])} in row {row}"
            )


def normalise(weights: Tensor | None, k: int, name: str = "weights") -> list[float]:
    if weights is None:
        return [1.0 / k] * k
    values: list[float] = weights.tolist()
    if not all(math.isfinite(w) and w >= 0 for w in values) or not sum(values) > 0:
        raise ValueError(f"{name}: expected finite, not negative, with a positive sum, got {values}")
    total = math.fsum(values)
    return [w / total for w in values]


def reference(
    logits: Sequence[Tensor], labels: Tensor | None, weights: Sequence[float], ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """The same formulas in plain torch, in float64 for float64 logits and in float32 otherwise."""
    z = torch.stack([x if x.dtype == torch.float64 else x.float() for x in logits])  # (K, N, C)
    w = torch.tensor(weights, dtype=z.dtype, device=z.device)[:, None]  # (K, 1)
    log_p = z.log_softmax(-1)  # (K, N, C)
    p = log_p.exp()
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    undefined = (z.isnan() | (z == math.inf)).any(-1).any(0) | (z == -math.inf).all(-1).any(0)  # (N,)

    def entropy(q: Tensor) -> Tensor:
        return -torch.where(q > 0, q * q.log(), zero).sum(-1)

    mix = (w[..., None] * p).sum(0)  # (N, C)
    confidence, prediction = mix.max(-1)
    prediction = (mix == confidence[:, None]).int().argmax(-1)  # the lowest index on ties
    if len(logits) == 1:
        prediction = (z[0] == z[0].amax(-1, keepdim=True)).int().argmax(-1)  # exact, where exp may round to a tie
    votes = (z == z.amax(-1, keepdim=True)).int().argmax(-1)  # (K, N)
    share = torch.stack([(w * (votes == vote)).sum(0) for vote in votes])  # (K, N): support of model k's choice
    some = (p > 0) & (mix > 0)  # w p may underflow where p does not
    kl = torch.where(some, p * (log_p - mix.log()), zero).sum(-1)  # (K, N)
    columns = {
        "entropy": entropy(mix),
        "expected_entropy": (w * entropy(p)).sum(0),
        "mutual_information": (w * kl).sum(0).clamp(min=0),
        "confidence": confidence,
        "vote_entropy": -torch.where(w > 0, w * share.clamp(max=1).log(), zero).sum(0),
    }
    if labels is not None:
        y = labels.clamp(0, z.shape[-1] - 1)  # ignored rows get any label here and NaN below
        onehot = torch.nn.functional.one_hot(y, z.shape[-1]).to(z.dtype)
        log_py = log_p.gather(-1, y.expand(len(logits), -1)[..., None])[..., 0]  # (K, N)
        others = mix.masked_fill(onehot.bool(), 0)
        columns["nll"] = -torch.where(w > 0, w.log() + log_py, -math.inf).logsumexp(0)
        columns["mean_nll"] = -torch.where(w > 0, w * log_py, zero).sum(0)
        columns["margin"] = (mix * onehot).sum(-1) - others.amax(-1)
        columns["agreement"] = (w * (votes == y)).sum(0)
        columns["el2n"] = (others.sum(-1) ** 2 + (others**2).sum(-1)).sqrt()
        undefined = undefined | (labels == ignore_index)
    nothing = torch.full_like(confidence, math.nan)
    stats = torch.stack([columns.get(f, nothing) for f in FIELDS[:-1]])
    return stats.masked_fill(undefined, math.nan), prediction.masked_fill(undefined, -1)


def _prepare(
    logits: Sequence[Tensor], labels: Tensor | None, weights: Tensor | None, ignore_index: int, fields: int
) -> tuple[Sequence[Tensor], Tensor | None, list[float], int, int]:
    check_range(labels, logits[0].shape[1], ignore_index)
    share = normalise(weights, len(logits))
    return logits, None if labels is None else labels.contiguous(), share, ignore_index, fields


def _reference(
    logits: Sequence[Tensor], labels: Tensor | None, share: Sequence[float], ignore_index: int, fields: int
) -> tuple[Tensor, Tensor]:
    return reference(logits, labels, share, ignore_index)


@_backend.op(
    "ensemble_stats", reference=_reference, cpu=_native.ensemble, cuda=_cuda.ensemble, prepare=_prepare, operands=1
)
def _ensemble_stats(
    logits: Sequence[Tensor], labels: Tensor | None, weights: Tensor | None, ignore_index: int, fields: int
) -> tuple[Tensor, Tensor]:
    """(10, N) statistics and (N,) predictions."""
    n = logits[0].shape[0]
    stats = logits[0].new_empty(len(FIELDS) - 1, n, dtype=wide_dtype(*logits))
    return stats, logits[0].new_empty(n, dtype=torch.int64)
