"""What the fused output layer takes from its inputs alone: rows' squared norms and their projections, read as they lie.

In plain torch both would first be copies of ``hidden`` in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.kernels._common import HALF, Launch, aligned, ceil_div, round_up, unit_stride
from assay.kernels.folding import FOLD, fold, unfolded
from assay.kernels.philox import INPUT_SIDE, ROWS_PER_COUNTER, plan_signs, signs
from assay.kernels.sqnorm import SINGLE_BLOCK, SINGLE_WARPS, row_sqnorm

MIN_COLS = 16  # what tl.dot takes
# Rows, features at a time, warps and stages of a projection, by registers and not by a clock yet.
HALF_TILE, FLOAT_TILE, RAGGED_TILE = (64, 64, 8, 4), (32, 16, 8, 3), (32, 16, 4, 2)


@triton.jit
def times_sqnorm(x, out, size, x_row, BLOCK: tl.constexpr):
    """out[row] *= ‖x[row]‖²; a 0 stays one: in rows that are ignored, x may be anything."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(out + row)
    if factor != 0.0:
        norm = row_sqnorm(x + row * x_row, size, BLOCK)
        tl.store(out + row, (factor.to(tl.float64) * norm).to(tl.float32))


@triton.jit(do_not_specialize=["rows", "cols"])
def project_rows(
    x,  # (rows, size), last stride 1
    words,  # (.., size) int32: the signs, packed
    out,  # (rows, cols) float32, dense
    rows,
    size,
    x_row,
    cols,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLS: tl.constexpr,
    EVEN_D: tl.constexpr,
    FOLD: tl.constexpr,  # of features
    WIDEN: tl.constexpr,  # multiply in float32: the interpreter, whose bfloat16 arithmetic is wrong
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr = x + (tl.minimum(row, rows - 1) * x_row)[:, None]
    first = tl.program_id(1) * COLS
    words += (first // 32).to(tl.int64) * size
    k = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_M, COLS), tl.float32)
    product = tl.zeros((BLOCK_M, COLS), tl.float32)
    for d0 in range(0, size, BLOCK_D):
        d = d0 + k
        if EVEN_D:
            h = tl.load(x_ptr + d[None, :])
            sign = signs(words, size, d, COLS)
        else:
            h = tl.load(x_ptr + d[None, :], mask=(d < size)[None, :], other=0.0)
            sign = signs(words, size, tl.minimum(d, size - 1), COLS)
        if WIDEN:
            h = h.to(tl.float32)
        product = tl.dot(h, sign.to(h.dtype), product, input_precision="ieee")
        total, product = fold(total, product, d0 + BLOCK_D, FOLD)
    product = unfolded(total, product, FOLD)
    c = first + tl.arange(0, COLS)
    at = out + row[:, None] * cols + c[None, :]
    tl.store(at, product * scale, mask=(row < rows)[:, None] & (c < cols)[None, :])


def plan_sqnorm(hidden: Tensor, out: Tensor) -> Launch:
    """out (N,) float32, contiguous, *= the squared norms of hidden (N, D)'s rows."""
    arguments = {"x": hidden, "out": out, "size": hidden.shape[1], "x_row": hidden.stride(0), "BLOCK": SINGLE_BLOCK}
    return Launch(times_sqnorm, (len(hidden),), arguments, SINGLE_WARPS, 3)


def right(hidden: Tensor, words: Tensor, cols: int) -> Tensor:
    """hidden (N, D) -> P h, (N, cols) float32; ``words`` from ``pack_signs``, no size 0."""
    launch, out = plan_right(unit_stride(hidden), words, cols, interpret=not hidden.is_cuda)
    launch.run(hidden)
    return out


def plan_right(hidden: Tensor, words: Tensor, cols: int, *, interpret: bool = False) -> tuple[Launch, Tensor]:
    """The launch and what it fills. Meta tensors will do."""
    n, size = hidden.shape
    half = hidden.dtype in HALF
    regular = aligned([hidden, size, hidden.stride(0)])
    m, d, warps, stages = (HALF_TILE if half else FLOAT_TILE) if regular else RAGGED_TILE
    side = min(padded(cols), ROWS_PER_COUNTER)
    out = hidden.new_empty((n, cols), dtype=torch.float32)
    arguments = {
        "x": hidden,
        "words": words,
        "out": out,
        "rows": n,
        "size": size,
        "x_row": hidden.stride(0),
        "cols": cols,
        "scale": cols**-0.5,
        "BLOCK_M": m,
        "BLOCK_D": d,
        "COLS": side,
        "EVEN_D": size % d == 0,
        "FOLD": FOLD if half else 0,
        "WIDEN": interpret,
    }
    return Launch(project_rows, (ceil_div(n, m), ceil_div(cols, side)), arguments, warps, stages), out


def padded(cols: int) -> int:
    return max(MIN_COLS, triton.next_power_of_2(cols)) if cols <= ROWS_PER_COUNTER else round_up(cols, ROWS_PER_COUNTER)


def pack_signs(cols: int, features: int, key: tuple[int, int], device: torch.device) -> Tensor:
    """The signs of the input side, (words, features) int32, padded as the kernel's tiles are."""
    out = torch.empty(ceil_div(padded(cols), 32), features, dtype=torch.int32, device=device)
    for launch in plan_signs(out, INPUT_SIDE, key):
        launch.run(out)
    return out
