"""grad_dot: a GEMM whose epilogue multiplies by the other factor and keeps one number per row.

Σ_t G_t·(V A_t) = Σ_t A_t·(G_t V): with left × matrix = A Vᵀ or G V as the product, and right the factor that is left
over, row r of the result is Σ_n right[r,n] Σ_k left[r,k] matrix[k,n]. It is bilinear, so tiles of n, slices of k and
terms of a split matrix all write partial sums of their own, which a second kernel adds up in a fixed order in float64.

Tensor cores' sums are kept short (kernels/folding.py) by the slices: folds in the loop would make every step wait for
its product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.kernels._common import (
    FLOAT_COST,
    HALF,
    PROGRAMS,
    Launch,
    Tile,
    aligned,
    ceil_div,
    generation,
    round_up,
    run,
    unit_stride,
)
from assay.kernels.slices import plan_samples


@dataclass(frozen=True)
class Tiles:
    """Which tile for which shape and layout: the first that fits."""

    few_rows: Tile  # up to FEW_ROWS rows: bound by reading the matrix, so a thin tile with many loads in flight
    narrow: Tile  # up to NARROW columns: a classifier's head
    small: Tile  # addresses that are no multiples of 16 bytes, or types mixed: the registers go to them
    large: Tile


FEW_ROWS = 32
NARROW = 32
# Half-precision tiles run on tensor cores. Ampere's stay under 99 KB of shared memory, which Ada and consumer Blackwell
# also have; they are what an unlisted generation gets. On an H200, 128 × 256 took 4 to 6 % less time than two blocks of
# 128 × 128 on a processor, where slices of K were long enough; with short ones it took 2 % more.
HALF_TILES = {
    8: Tiles(Tile(32, 64, 64, 8, 4), Tile(128, 32, 64, 8, 4), Tile(64, 64, 32, 4, 3), Tile(128, 128, 64, 8, 3)),
    9: Tiles(Tile(32, 64, 64, 8, 6), Tile(128, 32, 64, 8, 4), Tile(64, 64, 32, 4, 3), Tile(128, 256, 64, 8, 3)),
    10: Tiles(Tile(32, 64, 64, 8, 6), Tile(128, 32, 64, 8, 4), Tile(64, 64, 32, 4, 3), Tile(128, 128, 64, 8, 4)),
}
# float32 runs on the ordinary units of every generation, a register per operand: short steps of K.
FLOAT_TILES = {
    8: Tiles(Tile(32, 32, 32, 4, 3), Tile(64, 32, 16, 4, 3), Tile(64, 64, 16, 4, 3), Tile(128, 128, 16, 8, 3)),
}
GROUP_M = 8
# Terms of a slice of K, by the truncation that kernels/folding.py gives for a square, of which this is half: the result
# is 1.9e-6 too small. Longer ones are faster (an H200: whole sums in 0.72 of the time of 768 terms).
SLICE = {torch.bfloat16: 1152, torch.float16: 512}
# A slice of K is worth a program of its own from this length: shorter ones spend their time in the epilogue.
MIN_K_SLICE = 512
# Tiles of rows may end with each sample, for this share of rows that are computed in vain: then a tile writes one sum.
SPARE_ROWS = 1 / 16
# bfloat16 factors times a float32 direction run three times over.
SPLIT_COST = 3
SPLIT_NUMBERS = 1 << 22  # of a direction, that are split at a time


# Not specialised: the sizes that change from batch to batch and help no load.
@triton.jit(do_not_specialize=["rows", "span", "splits"], do_not_specialize_on_alignment=["t_size"])
def _grad_dot(
    left,  # (B, T, K), last stride 1
    right,  # (B, T, N), last stride 1
    matrix,  # (terms, K, N), any strides
    partial,  # (terms * splits, n tiles, rows) float32; or (terms * splits, n tiles, m tiles), if WHOLE
    rows,  # B * T
    span,  # rows after which a tile ends: T if WHOLE, else all
    t_size,
    k_size,
    n_size,
    left_b,
    left_t,
    right_b,
    right_t,
    matrix_term,
    matrix_k,
    matrix_n,
    splits,  # slices of K ...
    k_slice,  # ... of this many, a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    WHOLE: tl.constexpr,  # a tile's rows are one sample's, and their sum is what is wanted
    WIDEN: tl.constexpr,  # multiply in float32: mixed types, and the interpreter, whose bfloat16 arithmetic is wrong
):
    # Row tiles advance in groups, so that the tiles of left and matrix that run together are few and stay in L2.
    pid = tl.program_id(0)
    span_tiles = tl.cdiv(span, BLOCK_M)
    m_tiles = (rows // span) * span_tiles
    n_tiles = tl.cdiv(n_size, BLOCK_N)
    group = pid // (GROUP_M * n_tiles)
    group_size = tl.minimum(m_tiles - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * n_tiles)
    tile_m = group * GROUP_M + within % group_size
    tile_n = within // group_size
    term = tl.program_id(1) // splits
    k_begin = (tl.program_id(1) % splits) * k_slice
    k_end = tl.minimum(k_begin + k_slice, k_size)

    # Rows and columns past the end read another one and are dropped below: no masks in the loop. The remainder keeps
    # what the compiler knows of contiguous columns, a minimum would not.
    within_span = (tile_m % span_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (tile_m // span_tiles).to(tl.int64) * span + tl.minimum(within_span, span - 1)
    b, t = row // t_size, row % t_size
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = k_begin.to(tl.int64) + tl.arange(0, BLOCK_K)
    l_ptr = left + (b * left_b + t * left_t)[:, None] + k[None, :]
    m_ptr = matrix + term.to(tl.int64) * matrix_term
    m_ptr = m_ptr + k[:, None] * matrix_k + (n % n_size).to(tl.int64)[None, :] * matrix_n
    m_step = tl.full((), BLOCK_K, tl.int64) * matrix_k

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(k_begin, k_end, BLOCK_K):
        if EVEN_K:
            x = tl.load(l_ptr)
            y = tl.load(m_ptr)
        else:
            more = k0 + tl.arange(0, BLOCK_K) < k_end
            x = tl.load(l_ptr, mask=more[None, :], other=0.0)
            y = tl.load(m_ptr, mask=more[:, None], other=0.0)
        if WIDEN:
            x, y = x.to(tl.float32), y.to(tl.float32)
        product = tl.dot(x, y, product, input_precision="ieee")
        l_ptr += BLOCK_K
        m_ptr += m_step

    # The other factor's addresses are made here, not held beside the product. A select: 0 × inf would be NaN. The kept
    # dimension is for Triton 3.6, which fails to compile a sum of sums over a Blackwell tensor-core result otherwise.
    mask = (within_span < span)[:, None] & (n < n_size)[None, :]
    r_ptr = right + (b * right_b + t * right_t)[:, None] + n[None, :]
    other = tl.load(r_ptr, mask=mask, other=0.0).to(tl.float32)
    sums = tl.sum(tl.where(mask, product * other, 0.0), axis=1, keep_dims=True)
    out = partial + (tl.program_id(1).to(tl.int64) * n_tiles + tile_n) * (m_tiles if WHOLE else rows)
    if WHOLE:
        tl.store(out + tile_m + tl.arange(0, 1), tl.sum(sums.to(tl.float64), axis=0).to(tl.float32))
    else:
        tl.store(out + row[:, None], sums, mask=(within_span < span)[:, None])


def grad_dot(inputs: Tensor, grads: Tensor, direction: Tensor) -> Tensor:
    """(B, T, I), (B, T, O), (O, I) -> (B,) float32; checked by ops.grad_dot, none of the sizes 0."""
    launch, partial = plan(inputs, grads, direction, generation(inputs), interpret=not inputs.is_cuda)
    result = partial.new_empty(len(inputs))
    run([launch, *plan_samples(partial, result)])
    return result


def plan(
    inputs: Tensor, grads: Tensor, direction: Tensor, generation: int, *, interpret: bool = False
) -> tuple[Launch, Tensor]:
    """The launch and the partial sums it fills, (terms * splits, n tiles, ...): one per row, or one per tile of rows.

    Meta tensors will do.
    """
    left, right, matrix = orient(inputs, grads, direction)
    left, right = unit_stride(left), unit_stride(right)
    half = left.dtype in HALF and cost(left.dtype, direction.dtype) < FLOAT_COST
    matrix = terms(matrix, left.dtype) if half else matrix[None]

    b, t, k = left.shape
    rows, n = b * t, right.shape[2]
    flat = all(x.stride(0) == t * x.stride(1) for x in (left, right))  # then a row is found without a division
    strides = {
        "left_b": left.stride(1 if flat else 0),
        "left_t": left.stride(1),
        "right_b": right.stride(1 if flat else 0),
        "right_t": right.stride(1),
        "matrix_term": matrix.stride(0),
        "matrix_k": matrix.stride(1),
        "matrix_n": matrix.stride(2),
    }
    easy = aligned([left, right, matrix, k, n, *strides.values()]) and left.dtype == matrix.dtype
    tile = _tile(left, right, generation, easy=easy, half=half)
    whole = rows > FEW_ROWS and round_up(t, tile.m) <= (1 + SPARE_ROWS) * t
    m_tiles, n_tiles = b * ceil_div(t, tile.m) if whole else ceil_div(rows, tile.m), ceil_div(n, tile.n)
    splits = max(1, min(PROGRAMS // (m_tiles * n_tiles), k // MIN_K_SLICE))
    if half:
        splits = max(splits, ceil_div(k, SLICE[left.dtype]))
    k_slice = round_up(ceil_div(k, splits), tile.k)
    splits = ceil_div(k, k_slice)
    partial = left.new_empty((len(matrix) * splits, n_tiles, m_tiles if whole else rows), dtype=torch.float32)

    arguments = {
        "left": left,
        "right": right,
        "matrix": matrix,
        "partial": partial,
        "rows": rows,
        "span": t if whole else rows,
        "t_size": 1 if flat else t,
        "k_size": k,
        "n_size": n,
        **strides,
        "splits": splits,
        "k_slice": k_slice,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP_M": GROUP_M,
        "EVEN_K": k % tile.k == 0,
        "WHOLE": whole,
        "WIDEN": interpret or not half,
    }
    grid = (m_tiles * n_tiles, len(matrix) * splits)
    return Launch(_grad_dot, grid, arguments, tile.warps, tile.stages, tile.registers), partial


def _tile(left: Tensor, right: Tensor, generation: int, *, easy: bool, half: bool) -> Tile:
    table = HALF_TILES if half else FLOAT_TILES
    # A float32 factor in a half-precision epilogue takes twice the registers: Ampere's tile everywhere.
    tiles = table[8] if right.dtype.itemsize > left.dtype.itemsize else table.get(generation, table[8])
    if left.shape[0] * left.shape[1] <= FEW_ROWS:
        return tiles.few_rows
    if right.shape[2] <= NARROW:
        return tiles.narrow
    return tiles.large if easy else tiles.small


def orient(inputs: Tensor, grads: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(left, right, matrix): A Vᵀ with G left over, or G V with A left over.

    The FLOPs are equal, so the one whose types multiply faster; then the one with the narrower product, whose epilogue
    reads less, writes fewer partial sums and has the longer loop before it.
    """
    i, o = inputs.shape[2], grads.shape[2]
    if (cost(grads.dtype, direction.dtype), i) <= (cost(inputs.dtype, direction.dtype), o):
        return grads, inputs, direction
    return inputs, grads, direction.T


def cost(left: torch.dtype, direction: torch.dtype) -> int:
    """FLOPs of left × direction, in units of a half-precision product."""
    if left in HALF and left == direction:
        return 1
    return SPLIT_COST if left == torch.bfloat16 else FLOAT_COST


def terms(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix`` as (terms, K, N) of ``dtype``, which add up to it exactly.

    Three bfloat16 words hold the 24 bits of a float32, so products with them on tensor cores are as good as float32's
    and cheaper. The copy is 1.5 times the direction's size.
    """
    if matrix.dtype == dtype:
        return matrix[None]
    words = matrix.new_empty((3, *matrix.shape), dtype=dtype)
    rows = max(1, SPLIT_NUMBERS // max(1, matrix.shape[1]))  # at a time: what is left of all would be copies as well
    for rest, *parts in zip(matrix.split(rows), *(word.split(rows) for word in words), strict=True):
        for part in parts:
            part.copy_(rest)
            rest = rest - part
    return words
