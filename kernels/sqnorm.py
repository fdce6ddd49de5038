"""grad_sqnorm: ‖Σ_t G_tᵀ A_t‖² per sample, from tiles that live in registers and are summed there.

Two plans, the one with fewer FLOPs is taken:

- Gram, Σ_tt' (A_t·A_t')(G_t·G_t'): each program holds one tile of A Aᵀ and the same tile of G Gᵀ. The matrices are
  symmetric: a tile off the diagonal stands for two.
- product, ‖GᵀA‖²: each program holds tiles of the O×I gradient, whose squares cannot cancel.

Tensor cores' long sums are folded, over features in the Gram plan and over positions in the other.

A Gram sum that keeps too little of its terms' magnitude is computed again as a product, by a second kernel that decides
this itself: no wait for the GPU, and a CUDA graph can capture both.
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
    Launch,
    aligned,
    ceil_div,
    generation,
    round_up,
    run,
    unit_stride,
)
from assay.kernels.folding import FOLDS, fold, unfolded
from assay.kernels.slices import plan_samples


@triton.jit
def _gram_step(x_ptr, y_ptr, left, product, BLOCK: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr):
    """product + x y over BLOCK features, of which only ``left`` are left."""
    if EVEN:
        x = tl.load(x_ptr)
        y = tl.load(y_ptr)
    else:
        k = tl.arange(0, BLOCK)
        x = tl.load(x_ptr, mask=(k < left)[None, :], other=0.0)
        y = tl.load(y_ptr, mask=(k < left)[:, None], other=0.0)
    if WIDEN:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, product, input_precision="ieee")


@triton.jit
def _term_sums(x, y, mask, EVEN: tl.constexpr):
    """Sums of a tile's terms x·y and of their absolute values, (TILE, 1) float64: float32 within a row, float64 beyond.

    The kept dimension is for Triton 3.6, which fails to compile a sum of sums over a Blackwell tensor-core result
    otherwise.
    """
    terms = x * y
    if not EVEN:
        terms = tl.where(mask, terms, 0.0)
    total = tl.sum(terms, axis=1, keep_dims=True).to(tl.float64)
    return total, tl.sum(tl.abs(terms), axis=1, keep_dims=True).to(tl.float64)


# Not specialised: the sizes that change from batch to batch and help no load.
@triton.jit(do_not_specialize=["t_size", "half"])
def _gram(
    inputs,  # (B, T, I), last stride 1
    grads,  # (B, T, O), last stride 1
    partial,  # (2, B, pairs) float64: sums of terms, sums of their absolute values
    t_size,
    i_size,
    o_size,
    inputs_b,
    inputs_t,
    grads_b,
    grads_t,
    half,  # where in partial the absolute values begin: B * pairs
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_O: tl.constexpr,
    FOLD_I: tl.constexpr,  # of features
    FOLD_O: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in float32: the interpreter, whose bfloat16 arithmetic is wrong
):
    # Pair p of the n(n+1)/2 is row tile p % n with the tile p // n further on, in a circle: each pair once.
    n = tl.cdiv(t_size, TILE)
    pairs = n * (n + 1) // 2
    b = (tl.program_id(0) // pairs).to(tl.int64)
    p = tl.program_id(0) % pairs
    r = (p % n) * TILE + tl.arange(0, TILE)
    c = (p % n + p // n) % n * TILE + tl.arange(0, TILE)

    # Positions past the end read another one and are dropped below.
    k = tl.arange(0, BLOCK)
    row, column = (r % t_size).to(tl.int64), (c % t_size).to(tl.int64)
    mask = (r < t_size)[:, None] & (c < t_size)[None, :]
    a_ptr = inputs + b * inputs_b
    x_ptr, y_ptr = a_ptr + (row * inputs_t)[:, None] + k[None, :], a_ptr + (column * inputs_t)[None, :] + k[:, None]
    x = tl.zeros((TILE, TILE), tl.float32)
    part = tl.zeros((TILE, TILE), tl.float32)
    for k0 in range(0, i_size, BLOCK):
        part = _gram_step(x_ptr, y_ptr, i_size - k0, part, BLOCK, EVEN_I, WIDEN)
        x, part = fold(x, part, k0 + BLOCK, FOLD_I)
        x_ptr += BLOCK
        y_ptr += BLOCK
    x = unfolded(x, part, FOLD_I)

    # The other factor's folds need no second accumulator: what they are for is linear in them.
    g_ptr = grads + b * grads_b
    x_ptr, y_ptr = g_ptr + (row * grads_t)[:, None] + k[None, :], g_ptr + (column * grads_t)[None, :] + k[:, None]
    totals, magnitudes = tl.zeros((TILE, 1), tl.float64), tl.zeros((TILE, 1), tl.float64)
    part = tl.zeros((TILE, TILE), tl.float32)
    for k0 in range(0, o_size, BLOCK):
        part = _gram_step(x_ptr, y_ptr, o_size - k0, part, BLOCK, EVEN_O, WIDEN)
        if FOLD_O > 0:
            due = (k0 + BLOCK) % FOLD_O == 0
            if due:
                some, absolute = _term_sums(x, part, mask, EVEN_T)
                totals += some
                magnitudes += absolute
                part = tl.zeros((TILE, TILE), tl.float32)
        x_ptr += BLOCK
        y_ptr += BLOCK
    some, absolute = _term_sums(x, part, mask, EVEN_T)
    total, magnitude = tl.sum(totals + some, axis=0), tl.sum(magnitudes + absolute, axis=0)
    copies = tl.where(p < n, 1.0, 2.0)  # beyond the diagonal: the tile and its transpose
    out = partial + tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    tl.store(out, copies * total)
    tl.store(out + half, copies * magnitude)


@triton.jit(do_not_specialize=["t_size", "splits", "pairs", "half", "cancelled"])
def _product(
    left,  # (B, T, M), last stride 1
    right,  # (B, T, N), last stride 1
    gram,  # (2, B, pairs) float64 from _gram, if RECOMPUTE
    partial,  # (B, splits) float64
    t_size,
    m_size,
    n_size,
    left_b,
    left_t,
    right_b,
    right_t,
    splits,
    pairs,
    half,
    cancelled,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    RECOMPUTE: tl.constexpr,  # only the samples whose Gram sum has cancelled
    FOLD: tl.constexpr,  # of positions
    WIDEN: tl.constexpr,
):
    b = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    n_tiles = tl.cdiv(n_size, BLOCK_N)
    tiles = tl.cdiv(m_size, BLOCK_M) * n_tiles
    gram_sum = tl.full((), 0.0, tl.float64)
    if RECOMPUTE:
        magnitude = tl.full((), 0.0, tl.float64)
        for p0 in range(0, pairs, 1024):
            p = p0 + tl.arange(0, 1024)
            gram_sum += tl.sum(tl.load(gram + b * pairs + p, mask=p < pairs, other=0.0), axis=0)
            magnitude += tl.sum(tl.load(gram + half + b * pairs + p, mask=p < pairs, other=0.0), axis=0)
        again = gram_sum < cancelled * magnitude
        tiles = tl.where(again, tiles, 0)
        gram_sum = tl.where(again | (split > 0), 0.0, gram_sum)

    norm = tl.zeros((BLOCK_M,), tl.float64)
    for tile in range(split, tiles, splits):
        m = (tile // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = (tile % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        t = tl.arange(0, BLOCK_T)
        x_ptr = left + b * left_b + t.to(tl.int64)[None, :] * left_t + (m % m_size)[:, None]
        y_ptr = right + b * right_b + t.to(tl.int64)[:, None] * right_t + (n % n_size)[None, :]
        x_step = tl.full((), BLOCK_T, tl.int64) * left_t
        y_step = tl.full((), BLOCK_T, tl.int64) * right_t
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for t0 in range(0, t_size, BLOCK_T):
            x = tl.load(x_ptr, mask=(t0 + t < t_size)[None, :], other=0.0)
            y = tl.load(y_ptr, mask=(t0 + t < t_size)[:, None], other=0.0)
            if WIDEN:
                x, y = x.to(tl.float32), y.to(tl.float32)
            product = tl.dot(x, y, product, input_precision="ieee")
            total, product = fold(total, product, t0 + BLOCK_T, FOLD)
            x_ptr += x_step
            y_ptr += y_step
        product = unfolded(total, product, FOLD)
        inside = (m < m_size)[:, None] & (n < n_size)[None, :]
        squares = tl.where(inside, product * product, 0.0)
        norm += tl.sum(squares, axis=1).to(tl.float64)
    tl.store(partial + tl.program_id(0), gram_sum + tl.sum(norm, axis=0))


@triton.jit
def row_sqnorm(row, size, BLOCK: tl.constexpr):
    squares = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, size, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        x = tl.load(row + k, mask=k < size, other=0.0).to(tl.float32)
        squares += x * x
    return tl.sum(squares.to(tl.float64), axis=0)


@triton.jit
def _single(inputs, grads, out, i_size, o_size, inputs_b, grads_b, BLOCK: tl.constexpr):
    """One position: the gradient is an outer product, its norm the product of two rows' norms."""
    b = tl.program_id(0).to(tl.int64)
    norm = row_sqnorm(inputs + b * inputs_b, i_size, BLOCK) * row_sqnorm(grads + b * grads_b, o_size, BLOCK)
    tl.store(out + b, norm.to(tl.float32))


@dataclass(frozen=True)
class Gram:
    """A tile of ``tile`` × ``tile`` positions, from ``block`` features at a time."""

    tile: int
    block: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Product:
    """A block of the gradient, m × n, from ``t`` positions at a time."""

    m: int
    n: int
    t: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Products:
    """Which block for which gradient: the first that fits."""

    narrow: Product  # the smaller side has up to NARROW features
    small: Product  # addresses that are no multiples of 16 bytes, or types mixed: the registers go to them
    large: Product
    long: Product  # the same for more positions than one sum on tensor cores takes: they are folded


NARROW = 32
# Programs that look for samples to compute again: most find none, so no more than a card runs at a time.
RECOMPUTING = 128
# The largest Gram tile is taken from this many programs on, which fill half of an H200. There the next one made 260 to
# 270 TFLOP/s, all processors busy; the product plan's 128 × 128, the same loop, 700 on those that had a tile.
LARGE_GRAMS = 64
# Up to this many positions, one Gram tile holds them all.
MIDDLE_GRAM = 64
# Gram tiles by size. Two accumulators are live at once, so 128 × 128 is for Hopper and later, whose accumulators leave
# registers free. Ampere and unlisted generations stay under 99 KB of shared memory. float32 and ragged rows take short
# steps, for registers. Chosen by registers and shared memory (make compile-table), not by a clock yet.
HALF_GRAMS = {
    8: (Gram(16, 64, 1, 4), Gram(32, 64, 4, 4), Gram(64, 64, 8, 3)),
    9: (Gram(16, 64, 1, 4), Gram(32, 64, 4, 4), Gram(64, 64, 4, 4), Gram(128, 64, 8, 4)),
    10: (Gram(16, 64, 1, 4), Gram(32, 64, 4, 4), Gram(64, 64, 8, 4), Gram(128, 64, 8, 4)),
}
FLOAT_GRAMS = RAGGED_GRAMS = {8: (Gram(16, 32, 2, 3), Gram(32, 32, 4, 3), Gram(64, 16, 8, 3))}
# Tiles of the gradient: as in kernels/dot.py.
_NARROW, _SMALL = Product(128, 32, 32, 8, 5), Product(64, 32, 32, 4, 3)
HALF_PRODUCTS = {
    8: Products(_NARROW, _SMALL, Product(128, 128, 64, 8, 3), Product(128, 64, 64, 8, 3)),
    9: Products(_NARROW, _SMALL, Product(128, 128, 64, 8, 4), Product(128, 128, 64, 8, 4)),
    10: Products(_NARROW, _SMALL, Product(128, 128, 64, 8, 4), Product(128, 128, 64, 8, 4)),
}
_FLOAT = Product(128, 128, 16, 8, 3)
FLOAT_PRODUCTS = {8: Products(Product(64, 32, 16, 4, 3), Product(32, 32, 16, 4, 3), _FLOAT, _FLOAT)}
# Elements of a row that one program of the single-position kernel reads at a time.
SINGLE_BLOCK, SINGLE_WARPS = 1024, 8


def grad_sqnorm(inputs: Tensor, grads: Tensor, cancelled: float) -> Tensor:
    """(B, T, I), (B, T, O) -> (B,) float32; checked by ops.grad_sqnorm, none of the sizes 0.

    Gram sums under ``cancelled`` times the sum of their terms' absolute values are computed again in product form.
    """
    launches, result = plan(inputs, grads, cancelled, generation(inputs), interpret=not inputs.is_cuda)
    run(launches)
    return result


def plan(
    inputs: Tensor, grads: Tensor, cancelled: float, generation: int, *, interpret: bool = False
) -> tuple[list[Launch], Tensor]:
    """The launches and the norms (B,) that they make. Meta tensors will do."""
    inputs, grads = unit_stride(inputs), unit_stride(grads)
    if inputs.shape[1] == 1:
        return _plan_single(inputs, grads)
    gram = gram_tile(inputs, grads, generation)
    product = product_tile(inputs, grads, generation)
    if gram_is_cheaper(inputs, grads, gram, product):
        first, sums = _plan_gram(inputs, grads, gram, interpret)
        second, parts = _plan_product(inputs, grads, product, interpret, sums, cancelled)
        launches = [first, second]
    else:
        only, parts = _plan_product(inputs, grads, product, interpret)
        launches = [only]
    norms = inputs.new_empty(len(inputs), dtype=torch.float32)
    return [*launches, *plan_samples(parts.flatten(), norms)], norms


def gram_is_cheaper(inputs: Tensor, grads: Tensor, gram: Gram, product: Product) -> bool:
    """Whether the Gram form takes fewer FLOPs, whole tiles counted; far above a tile's size it is T < 2IO/(I+O).

    Gram: n(n+1)/2 · 2 tile² (I + O) for n = T/tile. Product: 2 T I O. FLOPs in float32 count FLOAT_COST each.
    """
    t, i, o = inputs.shape[1], inputs.shape[2], grads.shape[2]
    n = ceil_div(t, gram.tile)
    depth = round_up(i, gram.block) * flop_cost(inputs) + round_up(o, gram.block) * flop_cost(grads)
    area = tiles_of(product, i, o) * product.m * product.n * flop_cost(inputs, grads)
    return n * (n + 1) * gram.tile**2 * depth < 2 * round_up(t, product.t) * area


def flop_cost(*factors: Tensor) -> int:
    """Half-precision products run on tensor cores, if both factors are of one such type."""
    kinds = {x.dtype for x in factors}
    return 1 if len(kinds) == 1 and kinds <= set(HALF) else FLOAT_COST


def fold_of(terms: int, *factors: Tensor) -> int:
    """After how many terms a sum on tensor cores is folded; 0: it has no more than that, or is not on them."""
    longest = FOLDS[factors[0].dtype] if flop_cost(*factors) == 1 else terms
    return longest if terms > longest else 0


def gram_tile(inputs: Tensor, grads: Tensor, generation: int) -> Gram:
    """The tile that holds T positions, up to MIDDLE_GRAM; beyond, the largest if there are LARGE_GRAMS of it."""
    b, t, _ = inputs.shape
    if not _aligned(inputs, grads):
        table = RAGGED_GRAMS
    else:
        table = HALF_GRAMS if flop_cost(inputs) == flop_cost(grads) == 1 else FLOAT_GRAMS
    grams = table.get(generation, table[8])
    n = ceil_div(t, grams[-1].tile)
    if t > MIDDLE_GRAM and b * n * (n + 1) // 2 >= LARGE_GRAMS:
        return grams[-1]
    return next(gram for gram in grams if gram.tile >= min(t, MIDDLE_GRAM))


def product_tile(inputs: Tensor, grads: Tensor, generation: int) -> Product:
    table = HALF_PRODUCTS if flop_cost(inputs, grads) == 1 else FLOAT_PRODUCTS
    products = table.get(generation, table[8])
    if min(inputs.shape[2], grads.shape[2]) <= NARROW:
        return products.narrow
    if not _aligned(inputs, grads) or inputs.dtype != grads.dtype:
        return products.small
    return products.long if fold_of(inputs.shape[1], inputs, grads) else products.large


def tiles_of(product: Product, i: int, o: int) -> int:
    return ceil_div(max(i, o), product.m) * ceil_div(min(i, o), product.n)


def _aligned(*factors: Tensor) -> bool:
    return all(aligned([x, x.shape[2], *x.stride()]) for x in factors)


def _plan_single(inputs: Tensor, grads: Tensor) -> tuple[list[Launch], Tensor]:
    b = inputs.shape[0]
    out = inputs.new_empty(b, dtype=torch.float32)
    arguments = {
        "inputs": inputs,
        "grads": grads,
        "out": out,
        "i_size": inputs.shape[2],
        "o_size": grads.shape[2],
        "inputs_b": inputs.stride(0),
        "grads_b": grads.stride(0),
        "BLOCK": SINGLE_BLOCK,
    }
    return [Launch(_single, (b,), arguments, SINGLE_WARPS, 3)], out


def _plan_gram(inputs: Tensor, grads: Tensor, gram: Gram, interpret: bool) -> tuple[Launch, Tensor]:
    b, t, i = inputs.shape
    o = grads.shape[2]
    n = ceil_div(t, gram.tile)
    partial = inputs.new_empty((2, b, n * (n + 1) // 2), dtype=torch.float64)
    arguments = {
        "inputs": inputs,
        "grads": grads,
        "partial": partial,
        "t_size": t,
        "i_size": i,
        "o_size": o,
        "inputs_b": inputs.stride(0),
        "inputs_t": inputs.stride(1),
        "grads_b": grads.stride(0),
        "grads_t": grads.stride(1),
        "half": partial.stride(0),
        "TILE": gram.tile,
        "BLOCK": gram.block,
        "EVEN_T": t % gram.tile == 0,
        "EVEN_I": i % gram.block == 0,
        "EVEN_O": o % gram.block == 0,
        "FOLD_I": fold_of(i, inputs),
        "FOLD_O": fold_of(o, grads),
        "WIDEN": interpret,
    }
    return Launch(_gram, (partial[0].numel(),), arguments, gram.warps, gram.stages), partial


def _plan_product(
    inputs: Tensor, grads: Tensor, product: Product, interpret: bool, sums: Tensor | None = None, cancelled: float = 0.0
) -> tuple[Launch, Tensor]:
    """All samples; or, given the Gram sums, those that have cancelled, and the others' sums as they are."""
    left, right = (grads, inputs) if grads.shape[2] >= inputs.shape[2] else (inputs, grads)
    b, t, m = left.shape
    n = right.shape[2]
    splits = tiles_of(product, m, n)
    if sums is not None:
        splits = min(splits, max(1, RECOMPUTING // b))
    partial = left.new_empty((b, splits), dtype=torch.float64)
    arguments = {
        "left": left,
        "right": right,
        "gram": sums,
        "partial": partial,
        "t_size": t,
        "m_size": m,
        "n_size": n,
        "left_b": left.stride(0),
        "left_t": left.stride(1),
        "right_b": right.stride(0),
        "right_t": right.stride(1),
        "splits": splits,
        "pairs": 0 if sums is None else sums.shape[2],
        "half": 0 if sums is None else sums.stride(0),
        "cancelled": cancelled,
        "BLOCK_M": product.m,
        "BLOCK_N": product.n,
        "BLOCK_T": product.t,
        "RECOMPUTE": sums is not None,
        "FOLD": fold_of(t, left, right),
        "WIDEN": interpret or flop_cost(left, right) == FLOAT_COST,
    }
    return Launch(_product, (b * splits,), arguments, product.warps, product.stages), partial
