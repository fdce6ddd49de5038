"""The fused output layer: everything that is wanted from softmax(W h), without storing the logits.

With hidden state h, output matrix W, p = softmax(W h) and label y, the loss −log p_y has the gradient (p − y) hᵀ in W
and Wᵀ(p − y) in h. Statistics, inner products with directions, projections and that gradient are all sums over the
vocabulary weighted with p; a block of rows (CPU) or of vocabulary (GPU) gives its share of all of them while it is at
hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from assay.ops import _head_backends as backends
from assay.ops import ensemble
from assay.ops._backend import choose, custom_op, exact
from assay.ops.ensemble import EnsembleStats
from assay.ops.sketch import Kronecker

Tensors = Tensor | Sequence[Tensor]


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
    models = _check_models(hidden, weight, bias)
    labels = ensemble.check_labels(labels, len(models.hidden[0]), models.hidden[0].device)
    share = ensemble.check_weights(weights, len(models.hidden))
    mask = ensemble.check_fields(fields)
    stats, prediction, *_ = _head(*models, labels, share, ignore_index, mask, [], [0, 0], 0, False, False)
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
    models = _check_models(hidden, weight, bias)
    first = models.hidden[0]
    checked = ensemble.check_labels(labels, len(first), first.device)
    share = ensemble.check_weights(weights, len(models.hidden))
    mask = ensemble.check_fields(fields)
    steps = [] if directions is None else _check_directions(directions, models.weight)
    key, rows = (sketch.key, sketch.rows) if sketch is not None else ((0, 0), 0)
    outputs = _head(*models, checked, share, ignore_index, mask, steps, list(key), rows, True, False)
    stats, prediction, sqnorm, dot, left, _ = outputs
    return HeadScores(
        ensemble.pack_stats(stats, prediction, mask),
        sqnorm,
        dot if directions is not None else None,
        left if sketch is not None else None,
        _project_hidden(models.hidden, sketch) if sketch is not None else None,
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
        (N,) float32 (float64 for float64 inputs), not reduced. One row's NaN stays in its row.

    Raises:
        TypeError, ValueError: a shape, dtype or device is wrong.
        IndexError: a label outside [0, C).
    """
    models = _check_models(hidden.detach(), weight.detach(), None if bias is None else bias.detach())
    ensemble.check_labels(labels, len(models.hidden[0]), hidden.device)
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, ignore_index)  # type: ignore[no-untyped-call]
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
    ) -> Tensor:
        mask = ensemble.check_fields(["nll"])
        wanted = ctx.needs_input_grad[0]
        outputs = _head([hidden], [weight], [bias], labels, None, ignore_index, mask, [], [0, 0], 0, False, wanted)
        ctx.save_for_backward(hidden, weight, bias, labels, outputs[-1])
        ctx.ignore_index = ignore_index
        losses: Tensor = outputs[0][0]
        return losses.masked_fill(labels == ignore_index, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, gradient = ctx.saved_tensors
        into_hidden = into_weight = into_bias = None
        if ctx.needs_input_grad[0]:
            into_hidden = (gradient * outer[0][:, None]).to(hidden.dtype)
        if any(ctx.needs_input_grad[1:3]):
            into_weight, into_bias = _weight_gradient(hidden, weight, bias, labels, outer[0], ctx.ignore_index)
        return into_hidden, into_weight, into_bias if bias is not None else None, None, None


def _weight_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, outer: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Σ_n outer_n (p − y)_n h_nᵀ (C, D) and Σ_n outer_n (p − y)_n (C,), by blocks of rows."""
    wide, layer = outer.dtype, backends.Layer(hidden, weight, bias)
    into_weight = torch.zeros_like(weight, dtype=wide)
    into_bias = weight.new_zeros(len(weight), dtype=wide)
    for rows, residual in backends.residual_blocks(layer, labels, ignore_index):
        residual *= outer[rows, None]
        into_weight.addmm_(residual.T, hidden[rows].to(wide))
        into_bias += residual.sum(0)
    return into_weight.to(weight.dtype), into_bias.to(weight.dtype)


def _check_models(hidden: Tensors, weight: Tensors, bias: Tensor | Sequence[Tensor | None] | None) -> _Models:
    hiddens, weights = _as_list(hidden, "hidden"), _as_list(weight, "weight")
    if len(hiddens) != len(weights):
        raise ValueError(f"weight: expected one matrix per model, {len(hiddens)}, got {len(weights)}")
    if bias is None:
        biases: list[Tensor | None] = [None] * len(hiddens)
    elif isinstance(bias, Tensor):
        biases = list(bias[None] if bias.dim() == 1 else bias)
    else:
        biases = list(bias)
    if len(biases) != len(hiddens):
        raise ValueError(f"bias: expected one per model, {len(hiddens)}, got {len(biases)}")
    n, c, device = len(hiddens[0]), len(weights[0]), hiddens[0].device
    if c == 0:
        raise ValueError(f"weight[0]: expected at least one class, got shape {tuple(weights[0].shape)}")
    for k, (h, w, b) in enumerate(zip(hiddens, weights, biases, strict=True)):
        _check_tensor(f"hidden[{k}]", h, (n, h.shape[1]), device)
        _check_tensor(f"weight[{k}]", w, (c, h.shape[1]), device)
        if b is not None:
            _check_tensor(f"bias[{k}]", b, (c,), device)
    return _Models(
        [h.detach() for h in hiddens],
        [w.detach() for w in weights],
        [None if b is None else b.detach() for b in biases],
    )


def _as_list(tensors: Tensors, name: str) -> list[Tensor]:
    found = list(tensors[None] if tensors.dim() == 2 else tensors) if isinstance(tensors, Tensor) else list(tensors)
    if not found:
        raise ValueError(f"{name}: expected at least one model, got none")
    for k, x in enumerate(found):
        if x.dim() != 2:
            raise ValueError(f"{name}[{k}]: expected two dimensions, (rows, features), got shape {tuple(x.shape)}")
    return found


def _check_tensor(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
    if tuple(x.shape) != shape or x.device != device:
        raise ValueError(f"{name}: expected shape {shape} on {device}, got {tuple(x.shape)} on {x.device}")


def _check_directions(directions: Tensors, weight: list[Tensor]) -> list[Tensor]:
    found = _as_list(directions, "directions")
    if len(found) != len(weight):
        raise ValueError(f"directions: expected one matrix per model, {len(weight)}, got {len(found)}")
    for k, (v, w) in enumerate(zip(found, weight, strict=True)):
        _check_tensor(f"directions[{k}]", v, tuple(w.shape), w.device)
    return [v.detach() for v in found]


@exact()
def _project_hidden(hidden: list[Tensor], sketch: Kronecker) -> Tensor:
    """P_in h, (K, N, cols)."""
    projected = []
    for h in hidden:
        wide = h if h.dtype == torch.float64 else h.float()
        projected.append(wide @ sketch.input_side(h.shape[1], h.device).to(wide.dtype).T)
    return torch.stack(projected)


@custom_op("assay::head")
def _head(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    labels: Tensor | None,
    weights: Tensor | None,
    ignore_index: int,
    fields: int,
    directions: Sequence[Tensor],
    key: Sequence[int],
    rows: int,
    sqnorm: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op proper: statistics (10, N), prediction (N,), squared norms and dots (K, N), left factors (K, N, rows) and
    the gradient (N, D) of the first model; what is not asked for is empty."""
    ensemble.check_range(labels, len(weight[0]), ignore_index)
    share = ensemble.normalise(weights, len(hidden))
    wide = hidden[0].new_empty(0, dtype=_widest([*hidden, *weight]))
    run = {"cpu": backends.cpu, "reference": backends.reference, "triton": backends.triton}[
        choose("head_scores" if sqnorm else "linear_ensemble_stats", wide, "triton")
    ]
    wanted = backends.Wanted(fields, list(directions), (key[0], key[1]), rows, sqnorm, gradient)
    models = [backends.Layer(h, w, b) for h, w, b in zip(hidden, weight, bias, strict=True)]
    return run(models, labels, share, ignore_index, wanted)


@_head.register_fake
def _(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    labels: Tensor | None,
    weights: Tensor | None,
    ignore_index: int,
    fields: int,
    directions: Sequence[Tensor],
    key: Sequence[int],
    rows: int,
    sqnorm: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, (n, d) = len(hidden), hidden[0].shape
    wide = _widest([*hidden, *weight])

    def empty(*shape: int, wanted: bool = True) -> Tensor:
        return hidden[0].new_empty(*shape if wanted else (0,), dtype=wide)

    return (
        empty(10, n),
        hidden[0].new_empty(n, dtype=torch.int64),
        empty(k, n, wanted=sqnorm),
        empty(k, n, wanted=len(directions) > 0),
        empty(k, n, rows, wanted=rows > 0),
        empty(n, d, wanted=gradient),
    )


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
