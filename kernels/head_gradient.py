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


@triton.jit(do_not_specialize=["rows", "row_begin", "row_end", "c_begin", "c_end", "d_tiles", "splits", "ignore_index"])
def accumulate(
    residual,  # (rows of the panel, chunk)
    weight,  # (classes, size)
    labels,
    total,  # (rows, size) float32
    partial,  # (splits - 1, rows of the panel, size) float32, from the panel's first chunk on; or None
    rows,  # of the panel
    size,
    residual_row,
    weight_row,
    row_begin,
    row_end,
    c_begin,
    c_end,
    d_tiles,
    splits,  # of the chunk ...
    split,  # ... of this many columns, a multiple of BLOCK_K
    ignore_index,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of the total
    BLOCK_K: tl.constexpr,  # columns of the chunk
    GROUP_M: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """residual · weight over a split of the chunk: the first's is added to the total, each other's to its own sum."""
    block, tile = place(row_end - row_begin, d_tiles * splits, BLOCK_M, GROUP_M)
    part, tile = tile // d_tiles, tile % d_tiles
    first = block.to(tl.int64) * BLOCK_M
    local = tl.arange(0, BLOCK_M)
    inside = tl.minimum(first + local, row_end - row_begin - 1)
    y = tl.load(labels + row_begin + inside)
    if tl.max((y != ignore_index).to(tl.int32), 0) == 0:
        return  # nothing is predicted here: add_splits reads none of it
    d = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    r_row = residual + inside * residual_row
    added = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(part * split, tl.minimum((part + 1) * split, c_end - c_begin), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        c = c_begin + k
        r = tl.load(r_row[:, None] + k[None, :])
        w_row = weight + c.to(tl.int64) * weight_row
        w = tl.load(w_row[:, None] + d[None, :], mask=(c < c_end)[:, None] & (d < size)[None, :], other=0.0)
        if WIDEN:
            r = r.to(tl.float32)
            w = w.to(tl.float32)
        added = tl.dot(r, w, added, input_precision="ieee")
    added *= 1.0 / SCALE
    within = local[:, None] * size + d[None, :]
    mask = (first + local < row_end - row_begin)[:, None] & (d < size)[None, :]
    at = total + (row_begin + first) * size + within
    if partial is not None:
        beside = partial + ((part - 1).to(tl.int64) * rows + first) * size + within
        at = tl.where(part == 0, at, beside)
    if (part == 0) | (c_begin > 0):
        added += tl.load(at, mask=mask, other=0.0)
    tl.store(at, added, mask=mask)


@triton.jit(do_not_specialize=["rows", "row_begin", "row_end", "splits", "ignore_index"])
def add_splits(
    partial,
    labels,
    total,
    rows,  # of the panel
    size,
    row_begin,
    row_end,
    splits,
    ignore_index,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """total (.., size) += the splits beyond the first, in their order; rows that are ignored stay as they are."""
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = row < row_end - row_begin
    known = mask & (tl.load(labels + row_begin + row, mask=mask, other=ignore_index) != ignore_index)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    kept = known[:, None] & (d < size)[None, :]
    out = total + (row_begin + row)[:, None] * size + d[None, :]
    sums = tl.load(out, mask=kept, other=0.0)
    for part in range(splits - 1):
        sums += tl.load(partial + (part * rows.to(tl.int64) + row)[:, None] * size + d[None, :], mask=kept, other=0.0)
    tl.store(out, sums, mask=kept)
