"""How ``ops.head`` runs: in blocks of rows on the CPU, in blocks of vocabulary on a GPU, or in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from assay.ops import _native, ensemble
from assay.ops._tensors import adjacent_columns, wide_dtype
from assay.ops.ensemble import FIELDS
from assay.ops.layer_sketch import project_native
from assay.ops.sketch import INPUT_SIDE, OUTPUT_SIDE, cached, factor, signs

# The logits of as many rows as fit are held at a time, all models' together: with all else the op stays under 64 MB.
SCRATCH_BYTES = 48 << 20
# ... but no more rows than let their hidden states stay in the L2 cache.
MAX_ROWS = 256
# Columns of a 16-bit weight that are widened at a time.
WIDEN_COLUMNS = 4096

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Residuals = Callable[["Layer", Tensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class Layer:
    """One model's output layer and what goes into it: (N, D), (C, D), (C,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Request:
    """What is computed beside each other: the mask of statistics, and which functions of p − y."""

    directions: list[Tensor]
    fields: int
    key: tuple[int, int]  # of the sketch
    rows: int  # of the sketch; 0: none
    sqnorm: bool
    gradient: bool

    @property
    def residual(self) -> bool:
        return self.sqnorm or self.gradient

    def outputs(self, layers: Sequence[Layer], wide: torch.dtype) -> Outputs:
        """What ignored rows get; an output that was not asked for is empty."""
        k, (n, d) = len(layers), layers[0].hidden.shape
        first = layers[0].hidden

        def zeros(*shape: int, asked: bool = True) -> Tensor:
            return first.new_zeros(shape if asked else (0,), dtype=wide)

        return (
            zeros(len(FIELDS) - 1, n).fill_(torch.nan),
            first.new_full((n,), -1, dtype=torch.int64),
            zeros(k, n, asked=self.sqnorm),
            zeros(k, n, asked=len(self.directions) > 0),
            zeros(k, n, self.rows, asked=self.rows > 0),
            zeros(n, d, asked=self.gradient),
        )


def cpu(
    layers: Sequence[Layer], labels: Tensor | None, share: Sequence[float], ignore_index: int, request: Request
) -> Outputs:
    """A block of rows at a time: its logits over the whole vocabulary, then everything that is made of them."""
    outputs = request.outputs(layers, torch.float32)
    stats, prediction, sqnorm, dot, left, gradient = outputs
    layers = [_adjacent(layer) for layer in layers]
    directions = [adjacent_columns(v) for v in request.directions]
    classes = len(layers[0].weight)
    projection = signs(request.rows, classes, OUTPUT_SIDE, request.key).T if request.rows else None
    blocks = _row_blocks(labels, len(prediction), classes * (len(layers) + bool(directions)), ignore_index)
    scratch = torch.empty(len(layers) + bool(directions), max(map(len, blocks), default=0), classes)
    for rows in blocks:
        logits = scratch[:, : len(rows)]
        packed = [_native.pack_rows(layer.hidden[rows]) for layer in layers]
        for layer, hidden, out in zip(layers, packed, logits, strict=False):
            _native.linear(hidden, layer.weight, layer.bias, out)
        target = None if labels is None else labels[rows]
        if request.fields:
            models = list(logits[: len(layers)])
            stats[:, rows], prediction[rows] = _native.ensemble(models, target, share, ignore_index, request.fields)
        if not request.residual:
            continue
        assert target is not None
        for k, layer in enumerate(layers):
            residual = logits[k]
            squares = torch.from_numpy(_native.residual(residual, target, ignore_index))
            if request.sqnorm:
                sqnorm[k, rows] = (squares * layer.hidden[rows].double().square().sum(1)).float()
            if directions:
                product = logits[-1]
                _native.linear(packed[k], directions[k], None, product)
                sums = torch.zeros(len(rows), dtype=torch.float64)
                _native.multiply_reduce(residual, product, sums.numpy())
                dot[k, rows] = sums.float()
            if projection is not None:
                left[k, rows] = residual @ projection
        if request.gradient:
            gradient[rows] = _times(logits[0], layers[0].weight)
    return outputs


def _adjacent(layer: Layer) -> Layer:
    bias = None if layer.bias is None else layer.bias.float().contiguous()
    return Layer(layer.hidden, adjacent_columns(layer.weight), bias)


def _row_blocks(labels: Tensor | None, n: int, floats_per_row: int, ignore_index: int) -> list[Tensor]:
    """Indices of the rows to compute, all but the ignored ones, as many at a time as the scratch holds."""
    rows = torch.arange(n) if labels is None else torch.nonzero(labels != ignore_index)[:, 0]
    step = max(1, min(MAX_ROWS, SCRATCH_BYTES // (4 * floats_per_row)))
    if step > _native.LANES:
        step -= step % _native.LANES
    return [rows[i : i + step] for i in range(0, len(rows), step)]


def _times(residual: Tensor, weight: Tensor) -> Tensor:
    """(R, C) float32 @ (C, D) in float32."""
    if weight.dtype == torch.float32:
        return residual @ weight
    product = residual.new_zeros(len(residual), weight.shape[1])
    for c in range(0, len(weight), WIDEN_COLUMNS):
        product.addmm_(residual[:, c : c + WIDEN_COLUMNS], weight[c : c + WIDEN_COLUMNS].float())
    return product


def weight_gradient(
    residuals: Residuals,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    outer: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Σ_n outer_n (p − y)_n h_nᵀ (C, D) and Σ_n outer_n (p − y)_n (C,), by blocks of rows that are not ignored."""
    wide, adjacent = outer.dtype, adjacent_columns(weight)
    into_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
    into_bias = into_weight.new_zeros(len(weight))
    for rows in _row_blocks(labels, len(labels), len(weight), ignore_index):
        residual = residuals(Layer(hidden[rows], adjacent, bias), labels[rows], wide)
        residual *= outer[rows, None]
        into_weight.addmm_(residual.T, hidden[rows].to(wide))
        into_bias += residual.sum(0)
    return into_weight.to(weight.dtype), into_bias.to(weight.dtype)


def native_residuals(layer: Layer, labels: Tensor, wide: torch.dtype) -> Tensor:
    """p − y, (rows, C); every label is a class."""
    layer, residual = _adjacent(layer), torch.empty(len(labels), len(layer.weight))
    _native.linear(_native.pack_rows(layer.hidden), layer.weight, layer.bias, residual)
    _native.residual(residual, labels, -1)
    return residual


def plain_residuals(layer: Layer, labels: Tensor, wide: torch.dtype) -> Tensor:
    """The same in plain torch."""
    residual = _logits(layer, wide).softmax(1)
    residual[torch.arange(len(labels), device=labels.device), labels] -= 1
    return residual


def reference(
    layers: Sequence[Layer], labels: Tensor | None, share: Sequence[float], ignore_index: int, request: Request
) -> Outputs:
    """The same formulas in plain torch, with the logits; in float64 if an argument is and in float32 otherwise."""
    wide = wide_dtype(*request.directions, *(t for layer in layers for t in (layer.hidden, layer.weight)))
    outputs = request.outputs(layers, wide)
    stats, prediction, sqnorm, dot, left, gradient = outputs
    logits = [_logits(layer, wide) for layer in layers]
    columns, predicted = ensemble.reference(logits, labels, share, ignore_index)
    stats.copy_(columns)
    prediction.copy_(predicted)
    if not request.residual:
        return outputs
    assert labels is not None
    target, ignored = labels.clamp(0, logits[0].shape[1] - 1), (labels == ignore_index)[:, None]
    for k, (layer, z) in enumerate(zip(layers, logits, strict=True)):
        residual = z.softmax(1) - torch.nn.functional.one_hot(target, z.shape[1])
        residual = residual.masked_fill(ignored, 0)
        if request.sqnorm:
            sqnorm[k] = residual.square().sum(1) * layer.hidden.to(wide).square().sum(1)
        if request.directions:
            dot[k] = (residual * (layer.hidden.to(wide) @ request.directions[k].to(wide).T)).sum(1)
        if request.rows:
            matrix = signs(request.rows, z.shape[1], OUTPUT_SIDE, request.key, z.device)
            left[k] = residual @ matrix.to(wide).T
        if request.gradient:
            gradient.copy_(residual @ layer.weight.to(wide))
    return outputs


def _logits(layer: Layer, wide: torch.dtype) -> Tensor:
    hidden, weight = layer.hidden.to(wide), layer.weight
    if weight.dtype == wide:
        product = hidden @ weight.T
    else:
        product = torch.cat([hidden @ piece.to(wide).T for piece in torch.split(weight, WIDEN_COLUMNS)], 1)
    return product if layer.bias is None else product + layer.bias.to(wide)


def triton(
    layers: Sequence[Layer], labels: Tensor | None, share: Sequence[float], ignore_index: int, request: Request
) -> Outputs:
    """The fused kernels, which widen what they read where types are mixed; no row of logits is stored.

    Directions are rounded to the models' widest dtype.
    """
    from assay.kernels import head, head_hidden
    from assay.kernels._common import run

    outputs = request.outputs(layers, torch.float32)
    dtype = reduce(torch.promote_types, [t.dtype for layer in layers for t in (layer.hidden, layer.weight)])
    hidden = [adjacent_columns(layer.hidden) for layer in layers]
    weight = [adjacent_columns(layer.weight) for layer in layers]
    bias = [layer.bias for layer in layers]
    if not request.residual:
        stats, prediction = head.statistics(hidden, weight, bias, labels, share, ignore_index, request.fields)
        return stats, prediction, *outputs[2:]
    assert labels is not None
    if request.gradient:
        nll, gradient = head.losses(hidden[0], weight[0], bias[0], labels, ignore_index, True)
        outputs[0][0] = nll
        return *outputs[:5], gradient
    narrow = [v.to(dtype) if v.dtype.itemsize > dtype.itemsize else v for v in request.directions]
    directions = [adjacent_columns(v) for v in narrow] or None
    keys, rows = [request.key] * len(layers), request.rows or None
    stats, prediction, dot, sqnorm, left = head.scores(
        hidden, weight, bias, labels, share, ignore_index, request.fields, directions, keys, rows
    )
    run(head_hidden.plan_sqnorm(h, out) for h, out in zip(hidden, sqnorm, strict=True))
    dot, left = (given if made is None else made for given, made in zip(outputs[3:5], (dot, left), strict=True))
    return stats, prediction, sqnorm, dot, left, outputs[5]


def right_reference(hidden: Sequence[Tensor], key: Sequence[int], cols: int) -> Tensor:
    """P_in h in plain torch, (K, N, cols)."""
    wide, keys = wide_dtype(*hidden), (key[0], key[1])
    return torch.stack([h.to(wide) @ factor(cols, h.shape[1], INPUT_SIDE, keys, h.device).to(wide).T for h in hidden])


def right_cpu(hidden: Sequence[Tensor], key: Sequence[int], cols: int) -> Tensor:
    keys = (key[0], key[1])
    return torch.stack([project_native(h[None], cols, INPUT_SIDE, keys)[:, 0].T for h in hidden])


def right_triton(hidden: Sequence[Tensor], key: Sequence[int], cols: int) -> Tensor:
    from assay.kernels import head_hidden

    keys = (key[0], key[1])

    def words(h: Tensor) -> Tensor:
        make = partial(head_hidden.pack_signs, cols, h.shape[1], keys, h.device)
        return cached(("words", keys, INPUT_SIDE, cols, h.shape[1]), h.device, make)

    return torch.stack([head_hidden.right(h, words(h), cols) for h in hidden])
