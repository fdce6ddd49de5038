"""project, Rademacher: a product with a matrix of signs that is never stored, not even in shared memory.

A program makes the signs of 128 rows of the sketch, which one Philox block gives for each coordinate, in the registers
from which tensor cores take a product's first operand: the words of two neighbouring coordinates are woven into one
that holds a row's two signs 16 bits apart, and a shift and a mask with the bits of two ones make of it two numbers. A
sign costs one instruction, and serves all rows of the vectors that a program holds.

Half-precision vectors are multiplied as they are, a float32 as three bfloat16 words, which add up to it exactly. Tensor
cores cut their float32 sums off; so they add K coordinates up, and ordinary cores go on from there: to float32 within a
slice, whose length follows from D and dim, and to float64 beyond.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.kernels._common import Launch, ceil_div, run, unit_stride
from assay.kernels.philox import RADEMACHER, ROWS_PER_COUNTER, int32_key, philox4x32
from assay.kernels.sketch_rows import split_words
from assay.kernels.slices import plan_sum

WARPS, STAGES = 4, 3  # of 2 and 3 stages, 4 and 8 warps the fastest on an H200
ROWS = 16  # of the vectors in a program ...
# ... and groups of 128 rows of the sketch, and coordinates at a time: as many as registers hold, and at least a Philox
# block for each thread. Constants of the type alone, as a row's bits are.
HALF_TILE, FLOAT_TILE = (1, 128), (2, 64)
# A slice has so many coordinates for each number of the sketch, at least: its sums are written and read again.
TERMS = 8
MIN_SLICE = 1024
SLICES = 512  # ... and no more slices than these, but in pieces of so many programs for each tile of rows:
PROGRAMS = 2048
ONES = {torch.float16: 0x3C003C00, torch.bfloat16: 0x3F803F80}  # the bits of two


@triton.jit
def _woven(word, GROUPS: tl.constexpr, K: tl.constexpr):
    """(GROUPS, K) words of 32 rows -> (GROUPS, K / 2, 2): bits j and 16 + j are row j's at two neighbouring
    coordinates; then those of row 16 + j."""
    even, odd = tl.split(tl.reshape(word, (GROUPS, K // 2, 2)))
    return tl.join((even & 0xFFFF) | (odd << 16), (even >> 16) | (odd & 0xFFFF0000))


@triton.jit
def _sign_pairs(counter, group, side, key0, key1, ones, GROUPS: tl.constexpr, K: tl.constexpr):
    """(128 GROUPS, K / 2) uint32: ±1 in two halves each, for rows from 128 ``group`` on at coordinates ``counter``."""
    low = tl.broadcast_to(counter.to(tl.uint32)[None, :], (GROUPS, K))
    high = tl.broadcast_to((counter >> 32).to(tl.uint32)[None, :], (GROUPS, K))
    zero = tl.zeros_like(low)
    k0, k1 = zero + key0.to(tl.uint32, bitcast=True), zero + key1.to(tl.uint32, bitcast=True)
    block = (group + tl.arange(0, GROUPS)).to(tl.uint32)[:, None] + zero
    w0, w1, w2, w3 = philox4x32(low, high, block, zero + side, k0, k1)
    first = tl.join(_woven(w0, GROUPS, K), _woven(w1, GROUPS, K))
    second = tl.join(_woven(w2, GROUPS, K), _woven(w3, GROUPS, K))  # (GROUPS, K / 2, half of a word, word, of a pair)
    words = tl.reshape(tl.permute(tl.join(first, second), (0, 4, 3, 2, 1)), (8 * GROUPS, 1, K // 2))
    shift = (15 - tl.arange(0, 16)).to(tl.uint32)[None, :, None]
    # The two ones are an argument, so that they lie in a register: an instruction holds one constant.
    return tl.reshape(((words << shift) & 0x80008000) | ones.to(tl.uint32), (128 * GROUPS, K // 2))


# Not specialised: the sizes that change from batch to batch and help no load.
@triton.jit(do_not_specialize=["rows", "slices", "slice_blocks", "first", "side", "key0", "key1", "ones", "one"])
def _dense(
    vectors,  # (rows, count), last stride 1
    partial,  # (slices, rows, dim) float32
    rows,
    row_stride,
    count,
    first,  # the number of the first coordinate
    dim,
    slices,  # of the coordinates ...
    slice_blocks,  # ... of this many times K
    side,
    key0,
    key1,
    ones,
    one,  # 1.0, unknown to the compiler, which would have tensor cores add to ``sums`` directly
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,  # count % K = 0
    WIDEN: tl.constexpr,  # multiply in float32: the interpreter, whose bfloat16 arithmetic is wrong
):
    SPLIT: tl.constexpr = vectors.dtype.element_ty == tl.float32
    M: tl.constexpr = 128 * GROUPS
    tiles = tl.cdiv(dim, M)
    tile = tl.program_id(0) % tiles  # neighbours read the same numbers
    s = tl.program_id(0) // tiles % slices
    row = (tl.program_id(0) // tiles // slices).to(tl.int64) * N + tl.arange(0, N)
    begin = s.to(tl.int64) * slice_blocks * K
    end = tl.minimum(begin + slice_blocks.to(tl.int64) * K, count)
    start = vectors + row[:, None] * row_stride
    sums = tl.zeros((M, N), tl.float32)
    for c0 in range(begin, end, K):
        c = c0 + tl.arange(0, K)
        inside = (row < rows)[:, None] if EVEN else (row < rows)[:, None] & (c < end)[None, :]
        x = tl.load(start + c[None, :], mask=inside, other=0.0)
        pairs = _sign_pairs(first + c, tile * GROUPS, side, key0, key1, ones, GROUPS, K)
        halves = tl.reshape(tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)), (M, K))
        if WIDEN:  # from the same bits, which a bfloat16's are
            sign = (halves.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            sign = halves.to(tl.bfloat16 if SPLIT else vectors.dtype.element_ty, bitcast=True)
        if SPLIT:
            large, middle, small = split_words(x)
            part = tl.dot(sign, tl.trans(small.to(sign.dtype)), input_precision="ieee")
            part = tl.dot(sign, tl.trans(middle.to(sign.dtype)), part, input_precision="ieee")
            part = tl.dot(sign, tl.trans(large.to(sign.dtype)), part, input_precision="ieee")
        else:
            part = tl.dot(sign, tl.trans(x.to(sign.dtype)), input_precision="ieee")
        sums += part * one
    d = tile * M + tl.arange(0, M)
    at = partial + ((s.to(tl.int64) * rows + row) * dim)[None, :] + d[:, None]
    tl.store(at, sums, mask=(row < rows)[None, :] & (d < dim)[:, None])


def add_dense(vectors: Tensor, first: int, key: tuple[int, int], dim: int, sums: Tensor) -> None:
    """sums (B, dim) float64, contiguous, += the signed sums of vectors (B, n), whose coordinates begin at ``first``."""
    for launches in plan(vectors, first, key, dim, sums, interpret=not vectors.is_cuda):
        run(launches)


def plan(
    vectors: Tensor, first: int, key: tuple[int, int], dim: int, sums: Tensor, *, interpret: bool = False
) -> Iterator[tuple[Launch, Launch]]:
    """For each piece of the coordinates: the sums of slices, and their addition. Meta tensors will do."""
    vectors = unit_stride(vectors)
    blocks = slice_blocks(vectors, dim)
    step = max(1, PROGRAMS // ceil_div(dim, ROWS_PER_COUNTER)) * blocks * tile_of(vectors)[1]
    for c in range(0, vectors.shape[1], step):
        launch, partial = plan_dense(vectors[:, c : c + step], first + c, key, dim, blocks, interpret)
        yield launch, plan_sum(partial, sums)


def tile_of(vectors: Tensor) -> tuple[int, int]:
    return FLOAT_TILE if vectors.dtype == torch.float32 else HALF_TILE


def slice_blocks(vectors: Tensor, dim: int) -> int:
    """Times K coordinates of a slice: by D and dim alone, so that a row's bits are its own."""
    return ceil_div(max(MIN_SLICE, TERMS * dim, ceil_div(vectors.shape[1], SLICES)), tile_of(vectors)[1])


def plan_dense(
    vectors: Tensor, first: int, key: tuple[int, int], dim: int, blocks: int, interpret: bool
) -> tuple[Launch, Tensor]:
    """The launch and the partial sums it fills, (slices, B, dim)."""
    (b, count), (groups, k) = vectors.shape, tile_of(vectors)
    groups = min(groups, ceil_div(dim, ROWS_PER_COUNTER))
    slices = ceil_div(count, blocks * k)
    partial = vectors.new_empty((slices, b, dim), dtype=torch.float32)
    key0, key1 = int32_key(key)
    arguments = {
        "vectors": vectors,
        "partial": partial,
        "rows": b,
        "row_stride": vectors.stride(0),
        "count": count,
        "first": first,
        "dim": dim,
        "slices": slices,
        "slice_blocks": blocks,
        "side": RADEMACHER,
        "key0": key0,
        "key1": key1,
        "ones": ONES[torch.float16 if vectors.dtype == torch.float16 and not interpret else torch.bfloat16],
        "one": 1.0,
        "GROUPS": groups,
        "N": ROWS,
        "K": k,
        "EVEN": count % k == 0,
        "WIDEN": interpret,
    }
    grid = (ceil_div(dim, groups * ROWS_PER_COUNTER) * slices * ceil_div(b, ROWS),)
    return Launch(_dense, grid, arguments, WARPS, STAGES), partial
