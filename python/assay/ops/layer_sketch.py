"""Sketches of per-sample gradients, without the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from assay.ops import _backend, _native
from assay.ops._tensors import adjacent_columns, wide_dtype
from assay.ops.dot import check_factors
from assay.ops.masking import keep, mask_scale
from assay.ops.projection import Add, add_native, add_reference, add_triton, entries, scaled
from assay.ops.sketch import (
    FACTOR_BYTES,
    INPUT_SIDE,
    MASK_INPUT,
    MASK_OUTPUT,
    OUTPUT_SIDE,
    Kronecker,
    Mask,
    Sketch,
    cached,
    factor,
)

# Coordinates of a per-sample gradient that are multiplied out at a time, in whole rows. Not a matter of the batch: the
# projection's sums are cut where the tiles are.
TILE = 1 << 18
# ... for as many samples as keep the tile in cache; on a GPU, as give every processor something to do.
TILE_BYTES = 16 << 20
GPU_TILE_BYTES = 256 << 20


def grad_sketch(inputs: Tensor, grads: Tensor, sketch: Sketch) -> Tensor:
    """The sketch of every sample's gradient Σ_t grads[b,t]ᵀ inputs[b,t] (O, I), which is never held.

    Kronecker: row by row, (P_out Σ_t G_tᵀ)(P_in A_tᵀ)ᵀ, (B, rows · cols): both factors are read once, on a GPU up to
    sides of 128, where a sample has the same bits whatever its neighbours. Sparse and Rademacher: the
    projection of the flattened gradient, coordinate o · I + i, which is multiplied out in tiles that stay in cache.
    Mask: of the features that are left.

    Args:
        inputs: A, (B, T, I), or (B, I) for T = 1.
        grads: G, (B, T, O), or (B, O): gradients of the *sum* of the samples' losses. float32, bfloat16 or float16
            (mixed is fine; float64 runs the reference), any strides. Not differentiated.
        sketch: named after the layer (``sketch.named(layer)``): layers that share a name share a projection.

    Returns:
        (B, sketch.dim) float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit together, or a sketch too large for memory.
    """
    inputs, grads = check_factors(inputs, grads)
    out: Tensor
    if isinstance(sketch, Mask):
        _backend.need_no_gpu("grad_sketch", "there is no kernel for a Mask")
        return _masked(inputs, grads, sketch)
    if isinstance(sketch, Kronecker):
        _check_sides(sketch, inputs.shape[2], grads.shape[2])
        out = _kronecker(inputs, grads, sketch.key, sketch.rows, sketch.cols)
    else:
        key, dim, nonzeros = entries(sketch, len(inputs))
        out = _flat(inputs, grads, key, dim, nonzeros)
    return out


def _masked(inputs: Tensor, grads: Tensor, sketch: Mask) -> Tensor:
    scale = mask_scale(grads.shape[2], sketch.rows) * mask_scale(inputs.shape[2], sketch.cols)
    inputs = keep(inputs, sketch.cols, MASK_INPUT, sketch.key)
    grads = keep(grads, sketch.rows, MASK_OUTPUT, sketch.key)
    if sketch.then is not None:
        return grad_sketch(inputs, grads, sketch.then) * scale
    gradient: Tensor = _outer(inputs, grads) * scale
    missing = (0, sketch.cols - inputs.shape[2], 0, sketch.rows - grads.shape[2])
    return torch.nn.functional.pad(gradient, missing).flatten(1)


def _multiplied(inputs: Tensor, grads: Tensor) -> Tensor:
    wide = wide_dtype(inputs, grads)
    return torch.bmm(grads.to(wide).mT, inputs.to(wide))


@_backend.op("grad_sketch_outer", reference=_multiplied, cpu=_multiplied, label=lambda *_: "grad_sketch")
def _outer(inputs: Tensor, grads: Tensor) -> Tensor:
    """The samples' gradients (B, O, I), of few features each."""
    return inputs.new_empty(len(inputs), grads.shape[2], inputs.shape[2], dtype=wide_dtype(inputs, grads))


def _check_sides(sketch: Kronecker, inputs: int, outputs: int) -> None:
    for size, features in ((sketch.rows, outputs), (sketch.cols, inputs)):
        if 4 * size * features > FACTOR_BYTES:
            raise ValueError(
                f"{sketch}: the {size} × {features} signs of one side take {size * features / 2**28:.1f} GiB, more "
                f"than {FACTOR_BYTES / 2**30:g} GiB; take fewer rows and cols, or a Sparse sketch"
            )


def _multiply_sides(left: Tensor, right: Tensor) -> Tensor:
    """(rows, B, T), (cols, B, T) -> (B, rows · cols): the sum over positions of their outer products."""
    if left.shape[2] == 1:  # a product of 1 term each is slower as a GEMM per sample
        return (left[:, :, 0].T[:, :, None] * right[:, :, 0].T[:, None]).flatten(1)
    return torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)).flatten(1)


def _kronecker_reference(inputs: Tensor, grads: Tensor, key: Sequence[int], rows: int, cols: int) -> Tensor:
    wide, keys = wide_dtype(inputs, grads), (key[0], key[1])

    def side(x: Tensor, size: int, which: int) -> Tensor:
        return (x.to(wide) @ factor(size, x.shape[2], which, keys, x.device).to(wide).T).permute(2, 0, 1)

    return _multiply_sides(side(grads, rows, OUTPUT_SIDE), side(inputs, cols, INPUT_SIDE))


def _kronecker_cpu(inputs: Tensor, grads: Tensor, key: Sequence[int], rows: int, cols: int) -> Tensor:
    keys = (key[0], key[1])
    return _multiply_sides(
        project_native(grads, rows, OUTPUT_SIDE, keys), project_native(inputs, cols, INPUT_SIDE, keys)
    )


def project_native(x: Tensor, size: int, side: int, key: tuple[int, int]) -> Tensor:
    """x (B, T, features) -> (size, B, T): read once as it is, in its own dtype; the signs are the few rows."""
    b, t, features = x.shape
    packed = factor(size, features, side, key, x.device, _layout(size, x))
    out = torch.empty(size, b * t)
    _native.linear(packed, adjacent_columns(x.reshape(b * t, features)), None, out)
    return out.view(size, b, t)


def _kronecker_triton(inputs: Tensor, grads: Tensor, key: Sequence[int], rows: int, cols: int) -> Tensor:
    from assay.kernels import sketch

    keys = (key[0], key[1])

    def signs(x: Tensor, size: int, side: int) -> Tensor:
        """A ±1 each, in what multiplies them, kept for the next batch."""
        features, dtype = x.shape[2], sketch.sign_dtype(x)
        make = partial(sketch.make_signs, size, features, side, keys, dtype, x.device)
        return cached(("signs", keys, side, size, features, dtype), x.device, make)

    out: Tensor = sketch.kronecker(
        inputs, grads, signs(inputs, cols, INPUT_SIDE), signs(grads, rows, OUTPUT_SIDE), rows, cols
    )
    return out


@_backend.op(
    "grad_sketch_kronecker",
    reference=_kronecker_reference,
    cpu=_kronecker_cpu,
    triton=_kronecker_triton,
    operands=2,
    label=lambda *_: "grad_sketch",
)
def _kronecker(inputs: Tensor, grads: Tensor, key: Sequence[int], rows: int, cols: int) -> Tensor:
    return inputs.new_empty(len(inputs), rows * cols, dtype=wide_dtype(inputs, grads))


def _layout(size: int, x: Tensor) -> Callable[[Tensor], Tensor]:
    """How the signs are packed: a bfloat16 each where x is one and ±1/√size is, for processors that multiply those."""
    pairs = x.dtype == torch.bfloat16 and math.log2(size) % 2 == 0 and _native.multiplies_pairs()
    return _native.pack_pairs if pairs else _native.pack_rows


def _multiply_out(add: Add, inputs: Tensor, grads: Tensor, key: Sequence[int], dim: int, nonzeros: int) -> Tensor:
    wide = wide_dtype(inputs, grads)
    (b, _, i), o = inputs.shape, grads.shape[2]
    sums = inputs.new_zeros(b, dim, dtype=torch.float64)
    columns = max(1, min(o, TILE // max(1, i)))
    samples = max(1, (TILE_BYTES if inputs.device.type == "cpu" else GPU_TILE_BYTES) // (4 * columns * max(1, i)))
    for s in range(0, b, samples):
        a, g = inputs[s : s + samples].to(wide), grads[s : s + samples].to(wide)
        for c in range(0, o, columns):
            tile = torch.bmm(g[:, :, c : c + columns].mT, a).flatten(1)
            add(tile, c * i, (key[0], key[1]), dim, nonzeros, sums[s : s + samples])
    return scaled(sums, dim, nonzeros, wide)


@_backend.op(
    "grad_sketch",
    reference=partial(_multiply_out, add_reference),
    cpu=partial(_multiply_out, add_native),
    triton=partial(_multiply_out, add_triton),
)
def _flat(inputs: Tensor, grads: Tensor, key: Sequence[int], dim: int, nonzeros: int) -> Tensor:
    return inputs.new_empty(len(inputs), dim, dtype=wide_dtype(inputs, grads))
