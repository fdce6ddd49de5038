"""Squared norms of per-sample gradients, without the gradients."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.ops import _backend, _native
from assay.ops._tensors import adjacent_columns, wide_dtype
from assay.ops.dot import check_factors

# Intermediate tiles stay this small, so that the reduction finds them in cache.
TILE_BYTES = 1 << 20
WIDEN_BYTES = 8 << 20
# Width of a Gram tile: beyond it only the tiles on and above the diagonal are computed.
GRAM_TILE = 512
# Gram sums that keep less of their terms' magnitude than this have lost it to cancellation; float32 tiles carry about
# 2e-7 of that magnitude as error. They are computed again as a sum of squares.
CANCELLED = 1 / 16


def grad_sqnorm(inputs: Tensor, grads: Tensor) -> Tensor:
    """‖Σ_t grads[b,t]ᵀ inputs[b,t]‖² (squared Frobenius norm) for every sample b.

    Two plans, the cheaper in FLOPs is taken: the Gram form Σ_tt' (A_t·A_t')(G_t·G_t') ("ghost norm", 1510.01799 for
    T = 1, 2009.03106), and the product form ‖GᵀA‖² in tiles. Neither a T×T nor an O×I matrix is held whole. A Gram
    sum whose terms nearly cancel is recomputed in the product form, where they cannot.

    Args:
        inputs: A, (B, T, I), or (B, I) for T = 1.
        grads: G, (B, T, O), or (B, O), of the sum of the samples' losses. float32, bfloat16 or float16 (mixed is fine;
            float64 runs the reference), any strides.

    Returns:
        (B,) float32 (float64 if an argument is), never negative; tiles in float32, sums in double.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit together.
    """
    inputs, grads = check_factors(inputs, grads)
    out: Tensor = _grad_sqnorm(inputs, grads)
    return out


def reference(inputs: Tensor, grads: Tensor) -> Tensor:
    """The same in plain torch, sample by sample, in float64 if an argument is and in float32 otherwise."""
    wide = wide_dtype(inputs, grads)
    norms = [(g.to(wide).T @ a.to(wide)).square().sum() for a, g in zip(inputs, grads, strict=True)]
    return torch.stack(norms) if norms else inputs.new_zeros(0, dtype=wide)


def gram_is_cheaper(t: int, i: int, o: int) -> bool:
    """Whether the Gram form takes fewer FLOPs than the product form, as this op runs them."""
    tiles = -(-t // GRAM_TILE)
    gram = 2 * t * t * (i + o) * (tiles + 1) / (2 * tiles)  # tiles on and above the diagonal
    product = 2 * t * i * o
    return gram < product


def _cpu(inputs: Tensor, grads: Tensor) -> Tensor:
    t, i, o = *inputs.shape[1:], grads.shape[2]
    if t == 1:
        norms = _row_sqnorms(inputs[:, 0]) * _row_sqnorms(grads[:, 0])
    elif gram_is_cheaper(t, i, o):
        norms, magnitude = _gram(inputs, grads)
        again = np.flatnonzero(norms < CANCELLED * magnitude)
        if again.size:
            rows = torch.from_numpy(again)
            norms[again] = _product(inputs[rows], grads[rows])
    else:
        norms = _product(inputs, grads)
    return torch.from_numpy(norms).float()


def _row_sqnorms(x: Tensor) -> NDArray[np.float64]:
    x = adjacent_columns(x)
    out = np.zeros(x.shape[0])
    _native.multiply_reduce(x, x, out)
    return out


def _gram(inputs: Tensor, grads: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Σ_tt' (A_t·A_t')(G_t·G_t') and the same over absolute values, by tiles on and above the diagonal."""
    b, t, _ = inputs.shape
    tile = min(t, GRAM_TILE)
    samples = _samples(inputs, grads, tile * tile)
    total, magnitude = np.zeros(b), np.zeros(b)
    for s in range(0, b, samples):
        a, g = inputs[s : s + samples].float(), grads[s : s + samples].float()
        part, absolute = np.zeros(len(a)), np.zeros(len(a))
        for r in range(0, t, tile):
            for c in range(r, t, tile):
                x = torch.bmm(a[:, r : r + tile], a[:, c : c + tile].mT)
                y = torch.bmm(g[:, r : r + tile], g[:, c : c + tile].mT)
                _native.multiply_reduce(x.flatten(1), y.flatten(1), part, absolute)
                twice = 1 if r == c else 2  # the tile below the diagonal is this one transposed
                total[s : s + samples] += twice * part
                magnitude[s : s + samples] += twice * absolute
    return total, magnitude


def _samples(inputs: Tensor, grads: Tensor, tile: int) -> int:
    """How many at a time: their tiles stay in cache, and of 16-bit factors no more are widened than WIDEN_BYTES."""
    samples = TILE_BYTES // (4 * tile)
    if inputs.dtype != torch.float32 or grads.dtype != torch.float32:
        samples = min(samples, WIDEN_BYTES // (4 * inputs.shape[1] * (inputs.shape[2] + grads.shape[2])))
    return max(1, samples)


def _product(inputs: Tensor, grads: Tensor) -> NDArray[np.float64]:
    """Σ_oi (Σ_t G_to A_ti)², by tiles of the gradient."""
    b, _, i = inputs.shape
    o = grads.shape[2]
    columns = max(1, min(o, TILE_BYTES // (4 * i)))
    samples = _samples(inputs, grads, i * columns)
    total = np.zeros(b)
    for s in range(0, b, samples):
        a, g = inputs[s : s + samples].float(), grads[s : s + samples].float()
        part = np.zeros(len(a))
        for c in range(0, o, columns):
            tile = torch.bmm(g[:, :, c : c + columns].mT, a).flatten(1)
            _native.multiply_reduce(tile, tile, part)
            total[s : s + samples] += part
    return total


def _triton(inputs: Tensor, grads: Tensor) -> Tensor:
    from assay.kernels import sqnorm as kernel

    out: Tensor = kernel.grad_sqnorm(inputs, grads, CANCELLED)
    return out


@_backend.op("grad_sqnorm", reference=reference, cpu=_cpu, triton=_triton)
def _grad_sqnorm(inputs: Tensor, grads: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], dtype=wide_dtype(inputs, grads))
