"""grad_sketch, Kronecker: both factors projected and multiplied out in one launch.

(P_out Σ_t G_tᵀ)(P_in A_tᵀ)ᵀ: a program holds a few positions of one sample, L = G P_outᵀ (t, rows) and R = A P_inᵀ
(t, cols), and adds up Lᵀ R. Up to the largest tile, the factors are read once. Signs are exact in every type: half-
precision factors are projected on tensor cores without a rounding. L, R and their product are float32.

The slices of T follow from one sample's shape, never from the batch: a sample's bits do not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.kernels._common import Launch, aligned, ceil_div, round_up, unit_stride
from assay.kernels.philox import ROWS_PER_COUNTER, plan_signs, signs
from assay.kernels.slices import plan_sum

MIN_SIDE = 16  # what tl.dot takes
# A slice of T reads at least so many times the bytes of its partial sums, which are written and read again.
READ_PER_WRITTEN = 8


@dataclass(frozen=True)
class Tile:
    """``side`` rows and columns of the sketch at most, from ``t`` positions, ``k`` features at a time."""

    side: int
    t: int
    k: int
    warps: int
    stages: int


# The first that holds both sides; a larger sketch is cut into the last. Few positions take a tile of FEW. Chosen by
# registers and shared memory (make compile-table), not by a clock yet.
FEW = 16
HALF_TILES = (Tile(32, 32, 128, 4, 5), Tile(64, 32, 64, 4, 5), Tile(128, 32, 64, 8, 5))
FLOAT_TILES = (Tile(32, 32, 32, 4, 5), Tile(64, 32, 16, 8, 5))
# Rows at addresses that are no multiples of 16 bytes: the registers go to them.
RAGGED_TILES = (Tile(64, 16, 16, 8, 2),)


@triton.jit
def _projected(
    factor,  # (t,) pointers to rows of a factor, whose last stride is 1
    words,  # (SIDE / 32, size): the signs, packed
    size,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """(T, SIDE) float32: the rows times the signs."""
    k = tl.arange(0, BLOCK)
    out = tl.zeros((T, SIDE), tl.float32)
    for k0 in range(0, size, BLOCK):
        if EVEN:
            x = tl.load(factor[:, None] + (k0 + k)[None, :])
            sign = signs(words, size, k0 + k, SIDE)
        else:
            x = tl.load(factor[:, None] + (k0 + k)[None, :], mask=(k0 + k < size)[None, :], other=0.0)
            sign = signs(words, size, tl.minimum(k0 + k, size - 1), SIDE)
        if WIDEN:
            x = x.to(tl.float32)
        out = tl.dot(x, sign.to(x.dtype), out, input_precision="ieee")
    return out


# Not specialised: the sizes that change from batch to batch and help no load.
@triton.jit(do_not_specialize=["t_size", "samples", "slices", "t_slice"])
def _kronecker(
    inputs,  # (B, T, I), last stride 1
    grads,  # (B, T, O), last stride 1
    in_words,  # (.., I) int32
    out_words,  # (.., O) int32
    partial,  # (slices, B, rows, cols) float32
    samples,
    t_size,
    i_size,
    o_size,
    inputs_b,
    inputs_t,
    grads_b,
    grads_t,
    rows,
    cols,
    scale,
    slices,  # of T ...
    t_slice,  # ... of this many positions, a multiple of BLOCK_T
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_O: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in float32: the interpreter, whose bfloat16 arithmetic is wrong
):
    b = (tl.program_id(0) // slices).to(tl.int64)
    s = tl.program_id(0) % slices
    col_tiles = tl.cdiv(cols, COLS)
    row_tile, col_tile = tl.program_id(1) // col_tiles, tl.program_id(1) % col_tiles
    # Beyond one tile, ROWS and COLS are multiples of 32: a tile's words are its own.
    out_words += (row_tile * ROWS // 32).to(tl.int64) * o_size
    in_words += (col_tile * COLS // 32).to(tl.int64) * i_size

    t_end = tl.minimum((s + 1) * t_slice, t_size)
    product = tl.zeros((ROWS, COLS), tl.float32)
    for t0 in range(s * t_slice, t_end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        inside = tl.minimum(t, t_end - 1).to(tl.int64)  # positions past the end read another one and are dropped
        g_rows = grads + b * grads_b + inside * grads_t
        a_rows = inputs + b * inputs_b + inside * inputs_t
        left = _projected(g_rows, out_words, o_size, BLOCK_T, BLOCK_K, ROWS, EVEN_O, WIDEN)
        right = _projected(a_rows, in_words, i_size, BLOCK_T, BLOCK_K, COLS, EVEN_I, WIDEN)
        left = tl.where((t < t_end)[:, None], left, 0.0)
        right = tl.where((t < t_end)[:, None], right, 0.0)
        product = tl.dot(tl.trans(left), right, product, input_precision="ieee")

    r = row_tile * ROWS + tl.arange(0, ROWS)
    c = col_tile * COLS + tl.arange(0, COLS)
    out = partial + (s.to(tl.int64) * samples + b) * rows * cols
    at = out + r.to(tl.int64)[:, None] * cols + c[None, :]
    tl.store(at, product * scale, mask=(r < rows)[:, None] & (c < cols)[None, :])


def kronecker(inputs: Tensor, grads: Tensor, in_words: Tensor, out_words: Tensor, rows: int, cols: int) -> Tensor:
    """(B, T, I), (B, T, O) -> (B, rows · cols) float32; checked by ops.grad_sketch, none of the sizes 0.

    ``in_words``, ``out_words``: the signs of both sides, from ``pack_signs``.
    """
    launch, partial = plan(inputs, grads, in_words, out_words, rows, cols, interpret=not inputs.is_cuda)
    launch.run(inputs)
    if len(partial) == 1:
        return partial[0].flatten(1)
    sums = partial.new_zeros(partial.shape[1:], dtype=torch.float64)
    plan_sum(partial, sums).run(inputs)
    return sums.flatten(1).float()


def plan(
    inputs: Tensor,
    grads: Tensor,
    in_words: Tensor,
    out_words: Tensor,
    rows: int,
    cols: int,
    *,
    interpret: bool = False,
) -> tuple[Launch, Tensor]:
    """The launch and the sums it fills, (slices, B, rows, cols). Meta tensors will do."""
    inputs, grads = unit_stride(inputs), unit_stride(grads)
    b, t, i = inputs.shape
    o = grads.shape[2]
    tile = tile_for(inputs, grads, max(rows, cols))
    block_t = FEW if t <= FEW else tile.t
    row_side, col_side = (min(padded(side), tile.side) for side in (rows, cols))
    t_slice = round_up(positions(inputs, grads, rows * cols), block_t)
    slices = ceil_div(t, t_slice)
    partial = inputs.new_empty((slices, b, rows, cols), dtype=torch.float32)
    arguments = {
        "inputs": inputs,
        "grads": grads,
        "in_words": in_words,
        "out_words": out_words,
        "partial": partial,
        "samples": b,
        "t_size": t,
        "i_size": i,
        "o_size": o,
        "inputs_b": inputs.stride(0),
        "inputs_t": inputs.stride(1),
        "grads_b": grads.stride(0),
        "grads_t": grads.stride(1),
        "rows": rows,
        "cols": cols,
        "scale": (rows * cols) ** -0.5,
        "slices": slices,
        "t_slice": t_slice,
        "BLOCK_T": block_t,
        "BLOCK_K": tile.k,
        "ROWS": row_side,
        "COLS": col_side,
        "EVEN_I": i % tile.k == 0,
        "EVEN_O": o % tile.k == 0,
        "WIDEN": interpret,
    }
    grid = (b * slices, ceil_div(rows, row_side) * ceil_div(cols, col_side))
    return Launch(_kronecker, grid, arguments, tile.warps, tile.stages), partial


def tile_for(inputs: Tensor, grads: Tensor, side: int) -> Tile:
    if not all(aligned([x, x.shape[2], *x.stride()]) for x in (inputs, grads)):
        tiles: tuple[Tile, ...] = RAGGED_TILES
    else:
        tiles = FLOAT_TILES if torch.float32 in (inputs.dtype, grads.dtype) else HALF_TILES
    return next((tile for tile in tiles if tile.side >= side), tiles[-1])


def positions(inputs: Tensor, grads: Tensor, numbers: int) -> int:
    """How many positions a slice should have, at least, to read enough for ``numbers`` sums."""
    read = inputs.shape[2] * inputs.element_size() + grads.shape[2] * grads.element_size()
    return min(inputs.shape[1], ceil_div(READ_PER_WRITTEN * 2 * 4 * numbers, read))


def padded(side: int) -> int:
    return max(MIN_SIDE, triton.next_power_of_2(side))


def pack_signs(size: int, features: int, side: int, key: tuple[int, int], device: torch.device) -> Tensor:
    """(words, features) int32: what ``sign_words`` makes of ``size`` rows, padded as the kernel's tiles are."""
    rows = padded(size) if size <= ROWS_PER_COUNTER else round_up(size, ROWS_PER_COUNTER)
    out = torch.empty(ceil_div(rows, 32), features, dtype=torch.int32, device=device)
    for launch in plan_signs(out, side, key):
        launch.run(out)
    return out
