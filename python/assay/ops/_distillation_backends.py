"""How ``ops.distillation`` runs: a block of rows against the whole vocabulary, then tiles of rows and vocabulary.

Natively on the CPU; in plain torch elsewhere, which is the reference, too. The logits of all models pass through two
buffers, and what is made of them is made while they are at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from assay.ops import _native, ensemble
from assay.ops._head_backends import Layer
from assay.ops._tensors import adjacent_columns, wide_dtype

# The two buffers of a block's logits take this, or a hundredth of what the student's whole logits would.
SCRATCH_BYTES = 32 << 20
# What is made for a tile of the gradient in the weight.
TILE_BYTES = 16 << 20
# Rows of a block or a tile, at most.
MAX_ROWS = 256
# A 16-bit weight is widened this much at a time.
WIDEN_BYTES = 4 << 20
# Elements that stay in a cache from one step of the softmax to the next; on a GPU, that fill it.
CPU_PIECE, GPU_PIECE = 1 << 18, 1 << 20

Rows = Tensor | slice
Sums = Callable[[Tensor, Tensor | None], Tensor]
Settle = Callable[[int, Tensor], None]


class Way(NamedTuple):
    """What differs by backend."""

    ready: Callable[[Layer], Layer]  # a layer as ``logits`` takes it, or parts of it
    logits: Callable[[Layer, Tensor], None]  # written into (rows, C)
    sums: Sums  # of the rows of x, or of x · y


class Models(NamedTuple):
    student: Layer
    teachers: dict[int, tuple[Layer, float]]  # those with a share, by their place, 1 the first's; its logarithm
    places: int  # of the teachers, also those without a share

    def ready(self, way: Way) -> Models:
        teachers = {k: (way.ready(layer), share) for k, (layer, share) in self.teachers.items()}
        return Models(way.ready(self.student), teachers, self.places)


def prepare(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Sequence[Tensor],
    teacher_weight: Sequence[Tensor],
    bias: Tensor | None,
    teacher_bias: Sequence[Tensor | None],
    share: Tensor | None,
    *others: Any,
) -> tuple[Any, ...]:
    shares = ensemble.normalise(share, len(teacher_hidden), "teacher_weights")
    wide = wide_dtype(hidden, weight, *teacher_hidden, *teacher_weight)
    of = zip(teacher_hidden, teacher_weight, teacher_bias, shares, strict=True)
    some = {k: (Layer(h, w, b), math.log(s)) for k, (h, w, b, s) in enumerate(of, 1) if s > 0}
    return Models(Layer(hidden, weight, bias), some, len(shares)), wide, *others


def divergences(
    way: Way, models: Models, wide: torch.dtype, temperature: float, reverse: bool, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A block of rows at a time: KL (N,), its gradient (N, D) in ``hidden`` and what normalises (1 + K, 2, N)."""
    student, weight = models.student, models.student.weight
    n, classes = len(student.hidden), len(weight)
    kl, normal = weight.new_empty(n, dtype=wide), weight.new_zeros(1 + models.places, 2, n, dtype=wide)
    into_hidden = weight.new_empty(student.hidden.shape if gradient else (0,), dtype=wide)
    models = models.ready(way)
    budget = max(SCRATCH_BYTES, n * classes * wide.itemsize // 100)
    step = min(n, _whole_lanes(min(MAX_ROWS, budget // (2 * classes * wide.itemsize))))
    scratch = weight.new_empty(2, step, classes, dtype=wide)
    for start in range(0, n, max(step, 1)):
        rows = slice(start, min(start + step, n))

        def settle(k: int, z: Tensor, rows: slice = rows) -> None:
            normalise(way.sums, z, temperature, normal[k, :, rows])

        buffers = scratch[:, : rows.stop - rows.start]
        log_p, log_q = _log_probabilities(way, models, rows, slice(None), buffers, settle)
        for part in _pieces(log_p):
            kl[rows][part] = divergence(log_p[part], log_q[part], reverse, way.sums)
            if gradient:
                to_residual(log_p[part], log_q[part], reverse, kl[rows][part])
        if gradient:
            _times(log_p, weight, into_hidden[rows])
    return kl, into_hidden.div_(temperature), normal


def weight_gradient(
    way: Way,
    models: Models,
    wide: torch.dtype,
    temperature: float,
    reverse: bool,
    normal: Tensor,
    kl: Tensor,
    outer: Tensor,
) -> tuple[Tensor, Tensor]:
    """Σ_n outer_n r_n h_nᵀ (C, D) and Σ_n outer_n r_n (C,), r the gradient in z, of rows that count; some classes at a
    time, so that a 16-bit weight has no float32 gradient."""
    weight, hidden = models.student.weight, models.student.hidden
    into_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    into_bias = weight.new_empty(len(weight), dtype=weight.dtype if (b := models.student.bias) is None else b.dtype)
    models = models.ready(way)
    blocks = torch.split(torch.nonzero(outer)[:, 0], MAX_ROWS)
    most = max(map(len, blocks))
    step = min(len(weight), _whole_lanes(TILE_BYTES // (wide.itemsize * (weight.shape[1] + 2 * most))))
    scratch = weight.new_empty(2, most, step, dtype=wide)
    for start in range(0, len(weight), step):
        columns = slice(start, min(start + step, len(weight)))
        tile = weight.new_zeros(columns.stop - start, weight.shape[1], dtype=wide)
        tile_bias = tile.new_zeros(len(tile))
        for rows in filter(len, blocks):

            def settle(k: int, z: Tensor, rows: Tensor = rows) -> None:
                z.div_(temperature).sub_(normal[k, 0, rows][:, None]).sub_(normal[k, 1, rows][:, None])

            log_p, log_q = _log_probabilities(way, models, rows, columns, scratch[:, : len(rows), : len(tile)], settle)
            for part in _pieces(log_p):
                to_residual(log_p[part], log_q[part], reverse, kl[rows][part])
            log_p.mul_((outer[rows] / temperature)[:, None])
            tile.addmm_(log_p.T, hidden[rows].to(wide))
            tile_bias += log_p.sum(0)
        into_weight[columns], into_bias[columns] = tile, tile_bias
    return into_weight, into_bias


def _log_probabilities(
    way: Way, models: Models, rows: Rows, columns: slice, buffers: Tensor, settle: Settle
) -> tuple[Tensor, Tensor]:
    """log p and log q of some rows and classes, in the two buffers.

    Args:
        settle: a model's number, 0 the student's, and its logits, of which it makes log-probabilities in place.
    """
    log_p, log_q = buffers
    first = min(models.teachers)
    for k, (layer, share) in models.teachers.items():
        into = log_q if k == first else log_p  # the student's own come last
        way.logits(_part(layer, rows, columns), into)
        settle(k, into)
        into += share
        if k != first:
            torch.logaddexp(log_q, log_p, out=log_q)
    way.logits(_part(models.student, rows, columns), log_p)
    settle(0, log_p)
    return log_p, log_q


def _part(layer: Layer, rows: Rows, columns: slice) -> Layer:
    return Layer(layer.hidden[rows], layer.weight[columns], None if layer.bias is None else layer.bias[columns])


def normalise(sums: Sums, z: Tensor, temperature: float, out: Tensor) -> None:
    """Logits become log-probabilities in place: (z / T − top) − log Σ exp(z / T − top); ``out`` (2, rows) holds top and
    the second logarithm. Where a logit is NaN or +inf, or all are −inf, all of the row becomes NaN."""
    for part in _pieces(z):
        x = z[part].div_(temperature)
        top = x.amax(1)
        x.sub_(top[:, None])
        total = sums(x.exp(), None).log()
        x.sub_(total[:, None])
        out[0, part], out[1, part] = top, total


def divergence(log_p: Tensor, log_q: Tensor, reverse: bool, sums: Sums) -> Tensor:
    """KL(q‖p), or KL(p‖q) with ``reverse``, of rows of log-probabilities (rows, C)."""
    first, second = (log_p, log_q) if reverse else (log_q, log_p)
    gap = _gap(first, second)
    infinite = gap.amax(1) == math.inf  # also where the probability itself is too small for its type
    return sums(first.exp(), gap).clamp(min=0).masked_fill_(infinite, math.inf)


def to_residual(log_p: Tensor, log_q: Tensor, reverse: bool, kl: Tensor) -> None:
    """``log_p`` becomes T times the gradient of the divergence in the student's logits; ``log_q`` is lost."""
    if reverse:
        gap = _gap(log_p, log_q).sub_(kl[:, None])
        log_p.exp_().mul_(gap)
    else:
        log_p.exp_().sub_(log_q.exp_())


def _gap(first: Tensor, second: Tensor) -> Tensor:
    """log first − log second, 0 where the first is impossible: 0 · log 0 = 0."""
    return (first - second).masked_fill_(first == -math.inf, 0)


def _pieces(x: Tensor) -> list[slice]:
    """Rows of ``x`` that are at hand together."""
    step = max(1, (GPU_PIECE if x.is_cuda else CPU_PIECE) // x.shape[1])
    return [slice(i, min(i + step, len(x))) for i in range(0, len(x), step)]


def _whole_lanes(count: int) -> int:
    """``count``, at least 1, and a multiple of the lanes if there are as many."""
    return max(1, count - count % _native.LANES if count > _native.LANES else count)


def _times(residual: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = residual weight, (rows, C) (C, D), widened a piece at a time."""
    if weight.dtype == residual.dtype:
        torch.mm(residual, weight, out=out)
        return
    out.zero_()
    for piece in _to_widen(weight, residual.dtype):
        out.addmm_(residual[:, piece], weight[piece].to(residual.dtype))


def _to_widen(weight: Tensor, wide: torch.dtype) -> list[slice]:
    step = max(1, WIDEN_BYTES // (wide.itemsize * max(1, weight.shape[1])))
    return [slice(i, i + step) for i in range(0, len(weight), step)]


def _native_logits(layer: Layer, out: Tensor) -> None:
    _native.linear(_native.pack_rows(layer.hidden), layer.weight, layer.bias, out)


def _native_ready(layer: Layer) -> Layer:
    bias = None if layer.bias is None else layer.bias.float().contiguous()
    return Layer(layer.hidden, adjacent_columns(layer.weight), bias)


def _native_sums(x: Tensor, y: Tensor | None) -> Tensor:
    """In an order that follows from the row alone."""
    found = np.zeros(len(x))
    _native.multiply_reduce(x, x.new_ones(1, x.shape[1]).expand_as(x) if y is None else y, found)
    return torch.from_numpy(found).float()


def _plain_logits(layer: Layer, out: Tensor) -> None:
    hidden, weight = layer.hidden.to(out.dtype), layer.weight
    for piece in [slice(None)] if weight.dtype == out.dtype else _to_widen(weight, out.dtype):
        torch.mm(hidden, weight[piece].to(out.dtype).T, out=out[:, piece])
    if layer.bias is not None:
        out += layer.bias.to(out.dtype)


def plain_sums(x: Tensor, y: Tensor | None) -> Tensor:
    return (x if y is None else x * y).sum(1)


NATIVE = Way(_native_ready, _native_logits, _native_sums)
PLAIN = Way(lambda layer: layer, _plain_logits, plain_sums)
