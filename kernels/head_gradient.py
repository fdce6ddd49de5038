"""The output layer's gradient into the network, Wᵀ(p − onehot(y)), a chunk of the vocabulary at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from assay.kernels.head_sweep import LOG2E, LOG_SUM, NOT_Y, TOP, place, product, shift

# Residuals lie in [−1, 1]. Scaled by a power of two, float16 holds those of 1e-8 to its full precision.
SCALE = tl.constexpr(16384.0)


@triton.jit(do_not_specialize=["rows", "row_begin", "row_end", "c_begin", "c_end", "n_tiles", "ignore_index"])
def residual(
    hidden,
    weight,
    bias,
    labels,
    model,  # (MODEL, rows)
    out,  # (rows of the panel, chunk): SCALE · (p − onehot(y)); 0 in rows that are ignored
    rows,
    size,
    hidden_row,
    weight_row,
    out_row,
    row_begin,  # the panel
    row_end,
    c_begin,  # the chunk
    c_end,
    n_tiles,
    ignore_index,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    block, tile = place(row_end - row_begin, n_tiles, BLOCK_M, GROUP_M)
    first = row_begin + block.to(tl.int64) * BLOCK_M
    local = tl.arange(0, BLOCK_M)
    inside = tl.minimum(first + local, row_end - 1)
    y = tl.load(labels + inside)
    known = y != ignore_index
    at = out + (first - row_begin) * out_row + tile * BLOCK_N  # of the tile: what is within it fits int32
    at = at + local[:, None] * out_row + tl.arange(0, BLOCK_N)[None, :]
    mask = (first + local < row_end)[:, None]
    if tl.max(known.to(tl.int32), 0) == 0:
        tl.store(at, tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty), mask=mask)
        return
    c = c_begin + tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.minimum(c, c_end - 1).to(tl.int64)
    x_row = hidden + inside * hidden_row
    z, _ = product(x_row, weight + column * weight_row, None, size, BLOCK_M, BLOCK_N, BLOCK_D, EVEN_D, WIDEN)
    z += shift(bias, c, c_end)[None, :]
    stride = rows.to(tl.int64)
    z = (z - tl.load(model + TOP * stride + inside)[:, None]) - tl.load(model + LOG_SUM * stride + inside)[:, None]
    p = tl.exp2(z * LOG2E)
    not_y = tl.load(model + NOT_Y * stride + inside)
    y = tl.where(known, y, -1).to(tl.int32)
    p = tl.where(c[None, :] == y[:, None], -not_y[:, None], p)
    p = tl.where(known[:, None], p * SCALE, 0.0)
    tl.store(at, p.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["row_begin", "row_end", "c_begin", "c_end", "d_tiles", "ignore_index"])
def accumulate(
    residual,  # (rows of the panel, chunk)
    weight,  # (classes, size)
    labels,
    total,  # (rows, size) float32
    size,
    residual_row,
    weight_row,
    row_begin,
    row_end,
    c_begin,
    c_end,
    d_tiles,
    ignore_index,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of the total
    BLOCK_K: tl.constexpr,  # columns of the chunk
    GROUP_M: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """total += residual · weight over the chunk."""
    block, tile = place(row_end - row_begin, d_tiles, BLOCK_M, GROUP_M)
    first = row_begin + block.to(tl.int64) * BLOCK_M
    local = tl.arange(0, BLOCK_M)
    inside = tl.minimum(first + local, row_end - 1)
    y = tl.load(labels + inside)
    if tl.max((y != ignore_index).to(tl.int32), 0) == 0:
        return
    d = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    r_row = residual + (inside - row_begin) * residual_row
    added = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, c_end - c_begin, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        c = c_begin + k
        r = tl.load(r_row[:, None] + k[None, :])
        w_row = weight + c.to(tl.int64) * weight_row
        w = tl.load(w_row[:, None] + d[None, :], mask=(c < c_end)[:, None] & (d < size)[None, :], other=0.0)
        if WIDEN:
            r = r.to(tl.float32)
            w = w.to(tl.float32)
        added = tl.dot(r, w, added, input_precision="ieee")
    at = total + first * size + local[:, None] * size + d[None, :]
    mask = (first + local < row_end)[:, None] & (d < size)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + added * (1.0 / SCALE), mask=mask)
