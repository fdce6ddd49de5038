"""grad_sketch, Kronecker: both factors are projected by two thin matrix products, then multiplied out.

``(P_out Σ_t G_tᵀ)(P_in A_tᵀ)ᵀ``: two launches make L = G P_outᵀ and R = A P_inᵀ, a tile of positions and a chunk of
features at a time, and read the factors once; another adds the chunks in their order and the outer products of L and R
over a slice of positions; a last one, where there are several slices, adds those. The signs are a matrix of ±1 as
wide as the factors' type, which is made once and stays in the L2 cache.

Signs are exact in every type, so that half-precision factors are projected on tensor cores without a rounding; a
float32 goes as three bfloat16 words, which add up to it exactly. L, R and their product are float32.

Chunks and slices follow from one sample's shape, never from the batch: a sample's bits do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.kernels._common import Launch, aligned, ceil_div, round_up, run, unit_stride
from assay.kernels.philox import fill_signs
from assay.kernels.sketch_fused import FUSED_M, MOST_SIDE, NARROW, plan_fused, plan_single
from assay.kernels.sketch_rows import thin_product
from assay.kernels.slices import plan_total

MIN_SIDE = 16  # what tl.dot takes
# What is read of a factor, or of both, is at least so many times the partial sums that come of it.
READ_PER_WRITTEN = 16
MIN_CHUNK = 512  # features: fewer would leave a pipeline that fills and drains
MIN_SLICE = 64  # positions
# L and R of as many samples as make this much are made before they are multiplied out: an L2 cache holds it.
SCRATCH_BYTES = 24 << 20
# One launch projects both factors and multiplies them out (sketch_fused.py) where T is at least so much, or a tile of
# positions so few bytes; a program takes at least so much of a sample, as far as there is.
FUSED_LEAST, FUSED_BYTES, FUSED_LEAST_BYTES = 512, 512 << 10, 128 << 10
SINGLE_NUMBERS = 256  # of a sketch whose single positions are multiplied out in registers


@dataclass(frozen=True)
class Tile:
    """``m`` positions of the factors' rows, ``k`` features at a time, ``side`` rows of the sketch at most."""

    m: int
    k: int
    side: int
    warps: int
    stages: int


# The first that holds the side; a larger sketch is cut into the last, and reads the factors again for each. Chosen by
# registers and shared memory (make compile-table), not by a clock yet.
HALF_TILES = (Tile(64, 64, 32, 4, 5), Tile(64, 64, 64, 4, 4), Tile(64, 64, 128, 4, 3))
FLOAT_TILES = (Tile(64, 32, 32, 4, 5), Tile(64, 32, 64, 4, 4), Tile(64, 32, 128, 8, 3))
# Rows at addresses that are no multiples of 16 bytes: read number by number.
RAGGED_TILES = (Tile(64, 32, 32, 4, 2), Tile(64, 32, 64, 4, 2), Tile(64, 32, 128, 8, 2))
PAD = 64  # features of the sign matrices are a multiple of every k
OUTER, OUTER_T, OUTER_WARPS = 64, 32, 4  # the outer products: a tile of the sketch, positions at a time


# Not specialised: the sizes that change from batch to batch and help no load.
@triton.jit(do_not_specialize=["rows", "t_size"])
def _project(
    factor,  # (B, T, size), last stride 1
    signs,  # (.., signs_row): ±1, and 0 beyond the sketch's side and the factor's size
    partial,  # (splits, rows, side) float32
    rows,  # B · T
    t_size,
    size,
    stride_b,
    stride_t,
    signs_row,
    side,
    chunk,  # features of a split, a multiple of BLOCK_K
    M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIDE: tl.constexpr,
    EVEN: tl.constexpr,  # size % BLOCK_K = 0
    WIDEN: tl.constexpr,  # multiply in float32: the interpreter, whose bfloat16 arithmetic is wrong
    STAGES: tl.constexpr,
):
    """partial[split], M rows × SIDE columns: the rows times the signs, over the split's features."""
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    inside = tl.minimum(row, rows - 1)  # rows past the end read another one and are dropped
    at = factor + (inside // t_size) * stride_b + (inside % t_size) * stride_t
    n = tl.program_id(2) * SIDE + tl.arange(0, SIDE)
    begin = split * chunk
    end = tl.minimum(begin + chunk, size)
    total = thin_product(at, signs, size, signs_row, begin, end, n, BLOCK_K, EVEN, WIDEN, STAGES, 0)
    out = partial + (split.to(tl.int64) * rows + row)[:, None] * side + n[None, :]
    tl.store(out, total, mask=(row < rows)[:, None] & (n < side)[None, :])


@triton.jit
def _added(partial, splits, rows, row, mask, side, n):
    """(len(row), len(n)) float32: the splits, added up in their order."""
    at = partial + row[:, None] * side + n[None, :]
    total = tl.zeros((row.shape[0], n.shape[0]), tl.float32)
    for s in range(splits):
        total += tl.load(
            at + tl.full((), s, tl.int64) * rows * side, mask=mask[:, None] & (n < side)[None, :], other=0.0
        )
    return total


@triton.jit(do_not_specialize=["samples", "t_size", "slices", "t_slice", "in_splits", "out_splits"])
def _multiply_out(
    left,  # (out_splits, B · T, rows) float32
    right,  # (in_splits, B · T, cols) float32
    out,  # (slices, B, rows, cols) float32
    samples,
    t_size,
    rows,
    cols,
    out_splits,
    in_splits,
    scale,
    slices,  # of T ...
    t_slice,  # ... of this many positions, a multiple of T
    T: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    b = (tl.program_id(0) // slices).to(tl.int64)
    s = tl.program_id(0) % slices
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(2) * COLS + tl.arange(0, COLS)
    t_end = tl.minimum((s + 1) * t_slice, t_size)
    product = tl.zeros((ROWS, COLS), tl.float32)
    for t0 in range(s * t_slice, t_end, T):
        t = t0 + tl.arange(0, T)
        row = b * t_size + t
        of_left = _added(left, out_splits, samples.to(tl.int64) * t_size, row, t < t_end, rows, r)
        of_right = _added(right, in_splits, samples.to(tl.int64) * t_size, row, t < t_end, cols, c)
        product = tl.dot(tl.trans(of_left), of_right, product, input_precision="ieee")
    at = out + (s.to(tl.int64) * samples + b) * rows * cols + r.to(tl.int64)[:, None] * cols + c[None, :]
    tl.store(at, product * scale, mask=(r < rows)[:, None] & (c < cols)[None, :])


def kronecker(inputs: Tensor, grads: Tensor, in_signs: Tensor, out_signs: Tensor, rows: int, cols: int) -> Tensor:
    """(B, T, I), (B, T, O) -> (B, rows · cols) float32; checked by ops.grad_sketch, none of the sizes 0.

    ``in_signs``, ``out_signs``: the signs of both sides, from ``make_signs``, in the factors' ``sign_dtype``.
    """
    inputs, grads = unit_stride(inputs), unit_stride(grads)
    out = inputs.new_empty(len(inputs), rows, cols, dtype=torch.float32)
    for launches in plan(inputs, grads, in_signs, out_signs, out, interpret=not inputs.is_cuda):
        run(launches)
    return out.flatten(1)


def plan(
    inputs: Tensor, grads: Tensor, in_signs: Tensor, out_signs: Tensor, out: Tensor, *, interpret: bool = False
) -> Iterator[list[Launch]]:
    """The launches that fill ``out`` (B, rows, cols), for some samples at a time. Meta tensors will do."""
    (b, t, i), o, (rows, cols) = inputs.shape, grads.shape[2], out.shape[1:]
    if t == 1 and rows * cols <= SINGLE_NUMBERS:
        yield [plan_single(inputs, grads, in_signs, out_signs, out, k_of(inputs, cols), k_of(grads, rows), interpret)]
        return
    if fuses(inputs, grads, rows, cols):
        t_slice = fused_positions(inputs, grads, rows * cols)
        slices = ceil_div(t, t_slice)
        sums = out[None] if slices == 1 else out.new_empty(slices, *out.shape)
        ks = k_of(inputs, cols), k_of(grads, rows)
        launch = plan_fused(inputs, grads, in_signs, out_signs, sums, t_slice, *ks, interpret, light(inputs, grads))
        yield [launch] if slices == 1 else [launch, plan_total(sums, out)]
        return
    in_splits, out_splits = ceil_div(i, chunk(inputs, cols)), ceil_div(o, chunk(grads, rows))
    t_slice = positions(inputs, grads, rows * cols)
    slices = ceil_div(t, t_slice)
    samples = min(b, max(1, SCRATCH_BYTES // (4 * t * (in_splits * cols + out_splits * rows))))
    right = inputs.new_empty(in_splits * samples * t * cols, dtype=torch.float32)
    left = inputs.new_empty(out_splits * samples * t * rows, dtype=torch.float32)
    partial = out.new_empty(slices * samples, rows, cols) if slices > 1 else None
    for first in range(0, b, samples):
        a, g, some = (x[first : first + samples] for x in (inputs, grads, out))
        sums = some[None] if partial is None else partial[: slices * len(a)].view(slices, len(a), rows, cols)
        yield [
            plan_project(a, in_signs, right, cols, interpret),
            plan_project(g, out_signs, left, rows, interpret),
            plan_outer(left, right, sums, t, out_splits, in_splits, t_slice),
            *([] if partial is None else [plan_total(sums, some)]),
        ]


def fuses(inputs: Tensor, grads: Tensor, rows: int, cols: int) -> bool:
    """Whether one program projects both factors of some positions: where a sample has enough of them for several, or so
    few features that one is soon done. By one sample's shape, as all else."""
    t = inputs.shape[1]
    return max(rows, cols) <= (MOST_SIDE if light(inputs, grads) else NARROW) and (
        t >= FUSED_LEAST or (t >= FUSED_M // 2 and FUSED_M * position_bytes(inputs, grads) <= FUSED_BYTES)
    )


def light(inputs: Tensor, grads: Tensor) -> bool:
    return all(tile_for(x, MIN_SIDE) == HALF_TILES[0] for x in (inputs, grads))


def fused_positions(inputs: Tensor, grads: Tensor, numbers: int) -> int:
    """Positions of a program: enough to be worth their sums, and some reading."""
    read = position_bytes(inputs, grads)
    least = max(ceil_div(READ_PER_WRITTEN * 4 * numbers, read), ceil_div(FUSED_LEAST_BYTES, read))
    return min(round_up(inputs.shape[1], FUSED_M), round_up(least, FUSED_M))


def position_bytes(inputs: Tensor, grads: Tensor) -> int:
    return inputs.shape[2] * inputs.element_size() + grads.shape[2] * grads.element_size()


def k_of(factor: Tensor, side: int) -> int:
    """Features at a time."""
    return tile_for(factor, side).k


def plan_project(factor: Tensor, signs: Tensor, partial: Tensor, side: int, interpret: bool) -> Launch:
    """Fills the beginning of ``partial`` with (splits, B · T, side)."""
    b, t, size = factor.shape
    tile, length = tile_for(factor, side), chunk(factor, side)
    width = min(padded(side), tile.side)
    arguments = {
        "factor": factor,
        "signs": signs,
        "partial": partial,
        "rows": b * t,
        "t_size": t,
        "size": size,
        "stride_b": factor.stride(0),
        "stride_t": factor.stride(1),
        "signs_row": signs.stride(0),
        "side": side,
        "chunk": length,
        "M": tile.m,
        "BLOCK_K": tile.k,
        "SIDE": width,
        "EVEN": size % tile.k == 0,
        "WIDEN": interpret,
        "STAGES": tile.stages,
    }
    grid = (ceil_div(b * t, tile.m), ceil_div(size, length), ceil_div(side, width))
    return Launch(_project, grid, arguments, tile.warps, tile.stages)


def plan_outer(
    left: Tensor, right: Tensor, sums: Tensor, t: int, out_splits: int, in_splits: int, t_slice: int
) -> Launch:
    slices, samples, rows, cols = sums.shape
    row_side, col_side = (min(padded(side), OUTER) for side in (rows, cols))
    arguments = {
        "left": left,
        "right": right,
        "out": sums,
        "samples": samples,
        "t_size": t,
        "rows": rows,
        "cols": cols,
        "out_splits": out_splits,
        "in_splits": in_splits,
        "scale": (rows * cols) ** -0.5,
        "slices": slices,
        "t_slice": t_slice,
        "T": MIN_SIDE if t <= MIN_SIDE else OUTER_T,
        "ROWS": row_side,
        "COLS": col_side,
    }
    grid = (samples * slices, ceil_div(rows, row_side), ceil_div(cols, col_side))
    return Launch(_multiply_out, grid, arguments, OUTER_WARPS, 1)


def tile_for(factor: Tensor, side: int) -> Tile:
    if not aligned([factor, factor.shape[2], *factor.stride()]):
        tiles = RAGGED_TILES
    else:
        tiles = FLOAT_TILES if factor.dtype == torch.float32 else HALF_TILES
    return next((tile for tile in tiles if tile.side >= side), tiles[-1])


def chunk(factor: Tensor, side: int) -> int:
    """Features of a split: of one length, as far as PAD lets them be, and enough to be worth their sums."""
    size = factor.shape[2]
    least = max(MIN_CHUNK, ceil_div(READ_PER_WRITTEN * 4 * side, factor.element_size()))
    return round_up(ceil_div(size, max(1, size // least)), PAD)


def positions(inputs: Tensor, grads: Tensor, numbers: int) -> int:
    """Positions of a slice: enough to be worth their ``numbers`` sums, all of T if it is short."""
    read, t = position_bytes(inputs, grads), inputs.shape[1]
    return min(round_up(t, OUTER_T), round_up(max(MIN_SLICE, ceil_div(READ_PER_WRITTEN * 4 * numbers, read)), OUTER_T))


def padded(side: int) -> int:
    return max(MIN_SIDE, 1 << (side - 1).bit_length())


def sign_dtype(factor: Tensor) -> torch.dtype:
    """What a factor's signs are held in: what multiplies them."""
    return torch.float16 if factor.dtype == torch.float16 else torch.bfloat16


def make_signs(
    size: int, features: int, side: int, key: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """±1, (size, features), with rows and columns of 0 up to what tiles read."""
    widest = HALF_TILES[-1].side
    rows = padded(size) if size <= widest else round_up(size, widest)
    out = torch.empty(rows, round_up(features, PAD), dtype=dtype, device=device)
    fill_signs(out, size, features, side, key)
    return out
