"""grad_sketch, Kronecker, in one launch: a program projects both factors of some positions and multiplies them out.

Nothing of L or R goes through memory; the price is that a position's features are one program's work. ``sketch.py``
says which shapes take it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from assay.kernels._common import Launch, ceil_div
from assay.kernels.sketch_rows import thin_product

FUSED_M = 64  # positions at a time
FUSED_WARPS, MORE_WARPS = 4, 8  # ... and where registers would not do otherwise
# Of sketches of 16 × 16, and of others: 99 KB of shared memory hold them.
FUSED_STAGES, MORE_STAGES = 8, 5
NARROW = 32  # sides up to here need fewer
SINGLE_M, SINGLE_WARPS, SINGLE_STAGES = 16, 4, 4  # samples of one position
FEATURES_FOLD = 256  # features that tensor cores add up, which cut their sums off: a multiple of every tile's step
MOST_SIDE = 64  # of a sketch; of float32 or ragged factors NARROW: registers


# Not specialised: the sizes that change from batch to batch and help no load.
@triton.jit(do_not_specialize=["samples", "t_size", "slices", "t_slice"])
def _fused(
    inputs,  # (B, T, i_size), last stride 1
    grads,  # (B, T, o_size), last stride 1
    in_signs,
    out_signs,
    out,  # (slices, B, rows, cols) float32
    samples,
    t_size,
    i_size,
    o_size,
    in_stride_b,
    in_stride_t,
    out_stride_b,
    out_stride_t,
    in_signs_row,
    out_signs_row,
    rows,
    cols,
    scale,
    slices,  # of T ...
    t_slice,  # ... of this many positions, a multiple of M
    M: tl.constexpr,
    IN_K: tl.constexpr,
    OUT_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    IN_EVEN: tl.constexpr,
    OUT_EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
    FOLD: tl.constexpr,
):
    b = (tl.program_id(0) // slices).to(tl.int64)
    s = tl.program_id(0) % slices
    t_end = tl.minimum((s + 1) * t_slice, t_size)
    r, c = tl.arange(0, ROWS), tl.arange(0, COLS)
    product = tl.zeros((ROWS, COLS), tl.float32)
    for t0 in range(s * t_slice, t_end, M):
        t = t0 + tl.arange(0, M)
        at = tl.minimum(t, t_end - 1).to(tl.int64)  # positions past the end read another one and are dropped
        x = inputs + b * in_stride_b + at * in_stride_t
        g = grads + b * out_stride_b + at * out_stride_t
        right = thin_product(x, in_signs, i_size, in_signs_row, 0, i_size, c, IN_K, IN_EVEN, WIDEN, STAGES, FOLD)
        left = thin_product(g, out_signs, o_size, out_signs_row, 0, o_size, r, OUT_K, OUT_EVEN, WIDEN, STAGES, FOLD)
        right = tl.where((t < t_end)[:, None], right, 0.0)
        left = tl.where((t < t_end)[:, None], left, 0.0)
        product = tl.dot(tl.trans(left), right, product, input_precision="ieee")
    to = out + (s.to(tl.int64) * samples + b) * rows * cols + r.to(tl.int64)[:, None] * cols + c[None, :]
    tl.store(to, product * scale, mask=(r < rows)[:, None] & (c < cols)[None, :])


@triton.jit(do_not_specialize=["samples"])
def _single(
    inputs,  # (B, 1, i_size), last stride 1
    grads,  # (B, 1, o_size), last stride 1
    in_signs,
    out_signs,
    out,  # (B, rows, cols) float32
    samples,
    i_size,
    o_size,
    in_stride_b,
    out_stride_b,
    in_signs_row,
    out_signs_row,
    rows,
    cols,
    scale,
    M: tl.constexpr,
    IN_K: tl.constexpr,
    OUT_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    IN_EVEN: tl.constexpr,
    OUT_EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
    FOLD: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    at = tl.minimum(b, samples - 1)
    r, c = tl.arange(0, ROWS), tl.arange(0, COLS)
    x, g = inputs + at * in_stride_b, grads + at * out_stride_b
    right = thin_product(x, in_signs, i_size, in_signs_row, 0, i_size, c, IN_K, IN_EVEN, WIDEN, STAGES, FOLD)
    left = thin_product(g, out_signs, o_size, out_signs_row, 0, o_size, r, OUT_K, OUT_EVEN, WIDEN, STAGES, FOLD)
    product = left[:, :, None] * right[:, None, :] * scale
    to = out + (b[:, None, None] * rows + r[None, :, None]) * cols + c[None, None, :]
    inside = (b < samples)[:, None, None] & (r < rows)[None, :, None] & (c < cols)[None, None, :]
    tl.store(to, product, mask=inside)


def plan_fused(
    inputs: Tensor,
    grads: Tensor,
    in_signs: Tensor,
    out_signs: Tensor,
    sums: Tensor,
    t_slice: int,
    in_k: int,
    out_k: int,
    interpret: bool,
    light: bool,
) -> Launch:
    """Fills ``sums`` (slices, B, rows, cols). ``light``: both factors are half-precision and aligned."""
    warps = FUSED_WARPS if light and max(sums.shape[2:]) <= NARROW else MORE_WARPS
    stages = FUSED_STAGES if light and max(sums.shape[2:]) <= 16 else MORE_STAGES
    arguments = {
        **_shared(inputs, grads, in_signs, out_signs, sums, in_k, out_k, interpret),
        "t_size": inputs.shape[1],
        "in_stride_t": inputs.stride(1),
        "out_stride_t": grads.stride(1),
        "slices": len(sums),
        "t_slice": t_slice,
        "M": FUSED_M,
        "STAGES": stages,
    }
    return Launch(_fused, (len(inputs) * len(sums),), arguments, warps, stages)


def plan_single(
    inputs: Tensor,
    grads: Tensor,
    in_signs: Tensor,
    out_signs: Tensor,
    out: Tensor,
    in_k: int,
    out_k: int,
    interpret: bool,
) -> Launch:
    """Fills ``out`` (B, rows, cols) from samples of one position."""
    arguments = {
        **_shared(inputs, grads, in_signs, out_signs, out, in_k, out_k, interpret),
        "M": SINGLE_M,
        "STAGES": SINGLE_STAGES,
    }
    return Launch(_single, (ceil_div(len(inputs), SINGLE_M),), arguments, SINGLE_WARPS, SINGLE_STAGES)


def _shared(
    inputs: Tensor,
    grads: Tensor,
    in_signs: Tensor,
    out_signs: Tensor,
    out: Tensor,
    in_k: int,
    out_k: int,
    interpret: bool,
) -> dict[str, object]:
    rows, cols = out.shape[-2:]
    return {
        "inputs": inputs,
        "grads": grads,
        "in_signs": in_signs,
        "out_signs": out_signs,
        "out": out,
        "samples": len(inputs),
        "i_size": inputs.shape[2],
        "o_size": grads.shape[2],
        "in_stride_b": inputs.stride(0),
        "out_stride_b": grads.stride(0),
        "in_signs_row": in_signs.stride(0),
        "out_signs_row": out_signs.stride(0),
        "rows": rows,
        "cols": cols,
        "scale": (rows * cols) ** -0.5,
        "IN_K": in_k,
        "OUT_K": out_k,
        "ROWS": max(16, triton.next_power_of_2(rows)),
        "COLS": max(16, triton.next_power_of_2(cols)),
        "IN_EVEN": inputs.shape[2] % in_k == 0,
        "OUT_EVEN": grads.shape[2] % out_k == 0,
        "WIDEN": interpret,
        "FOLD": FEATURES_FOLD,
    }
