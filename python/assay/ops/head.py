"""The fused output layer: everything that is wanted from softmax(W h), without storing the logits.

With hidden state h, output matrix W, p = softmax(W h) and label y, the loss −log p_y has the gradient (p − y) hᵀ in W
and Wᵀ(p − y) in h. Statistics, inner products with directions, projections and that gradient are all sums over the
vocabulary weighted with p; a block of rows (CPU) or of vocabulary (GPU) gives its share of all of them while it is at
hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assay.ops import _backend, ensemble
from assay.ops import _head_backends as backends
from assay.ops._tensors import check_int, check_like, check_matrices, check_tensor, first_order, wide_dtype
from assay.ops.ensemble import EnsembleStats
from assay.ops.sketch import Kronecker

Tensors = Tensor | Sequence[Tensor]

# What a call is named in errors where its backward pass will need the product once more.
CROSS_ENTROPY_OF_WEIGHT = "linear_cross_entropy, with a gradient in weight or bias"


@dataclass(frozen=True)
class HeadScores:
    """What ``head_scores`` gives; None where it was not asked for.

    The gradients are those of each row's own loss, −log p_y, in the output matrix: (p − y) hᵀ. In ignored rows that
    gradient is 0, and with it everything here but ``stats`` (NaN there) and ``right``.
    """

    stats: EnsembleStats
    grad_sqnorm: Tensor  #: (K, N): ‖(p − y) hᵀ‖² (Frobenius)
    grad_dot: Tensor | None = None  #: (K, N): ⟨(p − y) hᵀ, V_k⟩
    left: Tensor | None = None  #: (K, N, rows): P_out (p − y)
    right: Tensor | None = None  #: (K, N, cols): P_in h; a row's sketch is the outer product of its left and right


class _Models(NamedTuple):
    hidden: list[Tensor]  # K × (N, D_k)
    weight: list[Tensor]  # K × (C, D_k)
    directions: list[Tensor]  # K × (C, D_k), or none
    bias: list[Tensor | None]  # K × (C,)


def linear_ensemble_stats(
    hidden: Tensors,
    weight: Tensors,
    labels: Tensor | None = None,
    *,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    weights: Tensor | Sequence[float] | None = None,
    ignore_index: int = -100,
    fields: Iterable[str] | None = None,
) -> EnsembleStats:
    """``ensemble_stats`` of the logits hidden_k weight_kᵀ + bias_k, which are never stored.

    Args:
        hidden: (K, N, D), (N, D) for one model, or K tensors (N, D_k); float32, bfloat16 or float16 (float64 runs the
            reference), any strides. Not differentiated.
        weight: (K, C, D), (C, D) for one model, or K tensors (C, D_k).
        labels: (N,) int64 in [0, C) or ``ignore_index``. Without labels the label fields are NaN.
        bias: (K, C), (C,) for one model, or K tensors (C,), each of which may be None.
        weights: (K,), not negative, of the models in the mixture; scaled to sum to 1. None: equal.
        ignore_index: rows with this label are NaN in every field; they are not computed.
        fields: the names wanted, None for all.

    Returns:
        ``EnsembleStats`` of float32 (N,) tensors. Products are summed in float32 whatever the dtype: the statistics of
        bfloat16 models are those of unrounded logits.

    Raises:
        TypeError, ValueError: a shape, dtype, device, weight or field is wrong.
        IndexError: a label outside [0, C).
    """
    models = check_models(hidden, weight, bias)
    labels = ensemble.check_labels(labels, len(models.hidden[0]), models.hidden[0].device)
    share = ensemble.check_weights(weights, len(models.hidden))
    mask, ignore_index = ensemble.check_fields(fields), check_int("ignore_index", ignore_index)
    stats, prediction, *_ = _head(
        *models, labels, share, ignore_index, mask, [0, 0], 0, False, False, "linear_ensemble_stats"
    )
    return ensemble.pack_stats(stats, prediction, mask)


def head_scores(
    hidden: Tensors,
    weight: Tensors,
    labels: Tensor,
    *,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    weights: Tensor | Sequence[float] | None = None,
    directions: Tensors | None = None,
    sketch: Kronecker | None = None,
    ignore_index: int = -100,
    fields: Iterable[str] | None = None,
) -> HeadScores:
    """Statistics and the output layer's per-row gradient scores of K models, from one pass over the vocabulary.

    Args:
        hidden, weight, labels, bias, weights, ignore_index, fields: as in ``linear_ensemble_stats``. Labels are needed:
            they are what the gradient is taken for.
        directions: V, shaped as ``weight``, to take ⟨gradient, V_k⟩ with (Grad-Mimic, 2501.06708).
        sketch: projects the gradient: its rows the output side, its cols the input side.

    Returns:
        ``HeadScores``, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: a shape, dtype, device, weight or field is wrong.
        IndexError: a label outside [0, C).
    """
    models = check_models(hidden, weight, bias, directions)
    first = models.hidden[0]
    checked = ensemble.check_labels(labels, len(first), first.device, needed=True)
    share = ensemble.check_weights(weights, len(models.hidden))
    mask, ignore_index = ensemble.check_fields(fields), check_int("ignore_index", ignore_index)
    if not isinstance(sketch, Kronecker | None):
        raise TypeError(
            f"sketch: expected Kronecker, which projects the two factors of a gradient, or None, got {sketch!r}"
        )
    key, rows = (sketch.key, sketch.rows) if sketch is not None else ((0, 0), 0)
    outputs = _head(*models, checked, share, ignore_index, mask, list(key), rows, True, False, "head_scores")
    stats, prediction, sqnorm, dot, left, _ = outputs
    return HeadScores(
        ensemble.pack_stats(stats, prediction, mask),
        sqnorm,
        dot if directions is not None else None,
        left if sketch is not None else None,
        _right(models.hidden, list(key), sketch.cols) if sketch is not None else None,
    )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Each row's cross entropy of hidden weightᵀ + bias against its label, differentiable, without storing the logits.

    The gradient in ``hidden`` is made in the forward pass, while a block of logits is at hand; those in ``weight`` and
    ``bias`` take the product once more, in the backward pass.

    Args:
        hidden: (N, D); weight: (C, D); bias: (C,) or None; float32, bfloat16 or float16, any strides.
        labels: (N,) int64 in [0, C) or ``ignore_index``, where loss and gradient are 0.

    Returns:
        (N,) float32 (float64 for float64 inputs), not reduced. One row's NaN stays in its row, and a row whose loss
        enters a sum with a factor of 0 adds 0 to gradients, whatever its loss.

    Raises:
        TypeError, ValueError: a shape, dtype or device is wrong.
        IndexError: a label outside [0, C).
    """
    check_tensor("hidden", hidden, (2,), "two dimensions, (N, D)")
    check_tensor("weight", weight, (2,), "two dimensions, (C, D)")
    if bias is not None:
        check_tensor("bias", bias, (1,), "one dimension, (C,)")
    models = check_models(hidden, weight, bias)
    if not torch.is_grad_enabled():
        (hidden,), (weight,), _, (bias,) = models  # detached: no gradient is made
    ensemble.check_labels(labels, len(hidden), hidden.device, needed=True)
    ignore_index = check_int("ignore_index", ignore_index)
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, ignore_index)  # type: ignore[no-untyped-call]
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
    ) -> Tensor:
        mask = ensemble.check_fields(["nll"])
        models, gradient = _Models([hidden], [weight], [], [bias]), ctx.needs_input_grad[0]
        face = CROSS_ENTROPY_OF_WEIGHT if any(ctx.needs_input_grad[1:3]) else "linear_cross_entropy"
        outputs = _head(*models, labels, None, ignore_index, mask, [0, 0], 0, False, gradient, face)
        ctx.save_for_backward(hidden, weight, bias, labels, outputs[-1])
        ctx.ignore_index = ignore_index
        losses: Tensor = outputs[0][0]
        return losses.masked_fill(labels == ignore_index, 0)

    @staticmethod
    @first_order("linear_cross_entropy")
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, gradient = ctx.saved_tensors
        into_hidden = into_weight = into_bias = None
        if ctx.needs_input_grad[0]:
            unused = (outer[0] == 0)[:, None]  # such a row adds nothing, whatever its loss
            into_hidden = (gradient * outer[0][:, None]).masked_fill_(unused, 0).to(hidden.dtype)
        if any(ctx.needs_input_grad[1:3]):
            labels = labels.masked_fill(outer[0] == 0, ctx.ignore_index)
            into_weight, into_bias = _weight_gradient(hidden, weight, bias, labels, outer[0], ctx.ignore_index)
        return into_hidden, into_weight, into_bias if bias is not None else None, None, None


def check_models(
    hidden: Tensors,
    weight: Tensors,
    bias: Tensor | Sequence[Tensor | None] | None,
    directions: Tensors | None = None,
    prefix: str = "",
) -> _Models:
    """K models' tensors, detached, or an error that names the argument, whose name begins with ``prefix``."""
    hiddens = check_matrices(f"{prefix}hidden", hidden, "N, D")
    weights = check_matrices(f"{prefix}weight", weight, "C, D")
    count, device, n, c = len(hiddens), hiddens[0].device, len(hiddens[0]), len(weights[0])
    along = [] if directions is None else check_matrices("directions", directions, "C, D")
    for name, matrices in ((f"{prefix}weight", weights), ("directions", along)):
        if len(matrices) != count and (matrices or name != "directions"):
            raise ValueError(f"{name}: expected one matrix per model, {count}, got {len(matrices)}")
    biases = _check_biases(f"{prefix}bias", bias, count)
    if c == 0:
        raise ValueError(f"{prefix}weight[0]: expected at least one class, got shape {tuple(weights[0].shape)}")
    for k, (h, w, b) in enumerate(zip(hiddens, weights, biases, strict=True)):
        check_like(f"{prefix}hidden[{k}]", h, (n, h.shape[1]), device)
        check_like(f"{prefix}weight[{k}]", w, (c, h.shape[1]), device)
        if along:
            check_like(f"directions[{k}]", along[k], (c, h.shape[1]), device)
        if b is not None:
            check_like(f"{prefix}bias[{k}]", b, (c,), device)
    return _Models(hiddens, weights, along, [None if b is None else b.detach() for b in biases])


def _check_biases(name: str, bias: Tensor | Sequence[Tensor | None] | None, count: int) -> list[Tensor | None]:
    if bias is None:
        return [None] * count
    if isinstance(bias, Tensor):
        check_tensor(name, bias, (1, 2), "(K, C) or (C,)")
        biases: list[Tensor | None] = list(bias[None] if bias.dim() == 1 else bias)
    elif isinstance(bias, Iterable):
        biases = list(bias)
    else:
        raise TypeError(f"{name}: expected a tensor or a sequence of tensors, got {type(bias).__name__}")
    if len(biases) != count:
        raise ValueError(f"{name}: expected one per model, {count}, got {len(biases)}")
    return biases


@_backend.op(
    "head_right",
    reference=backends.right_reference,
    cpu=backends.right_cpu,
    triton=backends.right_triton,
    operands=1,
    label=lambda *_: "head_scores",
)
def _right(hidden: Sequence[Tensor], key: Sequence[int], cols: int) -> Tensor:
    """P_in h, (K, N, cols)."""
    return hidden[0].new_empty(len(hidden), len(hidden[0]), cols, dtype=wide_dtype(*hidden))


def _prepare(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    directions: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    labels: Tensor | None,
    weights: Tensor | None,
    ignore_index: int,
    *asked: Any,
) -> tuple[list[backends.Layer], Tensor | None, list[float], int, backends.Request]:
    """What the backends take; values are checked here, where they are known."""
    ensemble.check_range(labels, len(weight[0]), ignore_index)
    layers = [backends.Layer(h, w, b) for h, w, b in zip(hidden, weight, bias, strict=True)]
    mask, key, *parts, _ = asked
    request = backends.Request(list(directions), mask, (key[0], key[1]), *parts)
    return layers, labels, ensemble.normalise(weights, len(hidden)), ignore_index, request


def _without_kernel(*arguments: Any) -> str | None:
    if arguments[-1] != CROSS_ENTROPY_OF_WEIGHT:
        return None
    return "there is no triton kernel for it, only for the gradient in hidden"


@_backend.op(
    "head",
    reference=backends.reference,
    cpu=backends.cpu,
    triton=backends.triton,
    operands=3,
    prepare=_prepare,
    lacks=_without_kernel,
    label=lambda *arguments: arguments[-1],
)
def _head(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    directions: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    labels: Tensor | None,
    weights: Tensor | None,
    ignore_index: int,
    fields: int,
    key: Sequence[int],
    rows: int,
    sqnorm: bool,
    gradient: bool,
    face: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics (10, N), prediction (N,), squared norms and dots (K, N), left factors (K, N, rows) and the gradient
    (N, D) of the first model; what is not asked for is empty."""
    request = backends.Request(list(directions), fields, (key[0], key[1]), rows, sqnorm, gradient)
    layers = [backends.Layer(h, w, None) for h, w in zip(hidden, weight, strict=True)]
    return request.outputs(layers, wide_dtype(*hidden, *weight, *directions))


@_backend.op(
    "head_weight_gradient",
    reference=partial(backends.weight_gradient, backends.plain_residuals),
    cpu=partial(backends.weight_gradient, backends.native_residuals),
    operands=2,
    label=lambda *_: CROSS_ENTROPY_OF_WEIGHT,
)
def _weight_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, outer: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(len(weight))
