"""Philox4x32-10 (Salmon et al., SC 2011): random words from a counter and a key, the same on every backend."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from assay.kernels._common import Launch, ceil_div

# The counter's last word says what its bits are for: rows of a Kronecker sketch, its columns, entries of a Sparse one,
# of a Rademacher one.
OUTPUT_SIDE, INPUT_SIDE, SPARSE, RADEMACHER = 0, 1, 2, 3
ROWS_PER_COUNTER = 128  # one counter gives 4 words of 32 signs
SIGN_BLOCK = 512
SIGN_ROWS, SIGN_COLUMNS = 16, 256  # of a matrix of signs, at a time


def int32_key(key: tuple[int, int]) -> tuple[int, int]:
    """The key's words as kernels take them: int32, one type for every key."""
    key0, key1 = (word - (1 << 32) if word >> 31 else word for word in key)
    return key0, key1


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four words for each counter (c0, c1, c2, c3) under the key (k0, k1); all uint32, blocks or scalars."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["block", "key0", "key1"])
def sign_words(out, count, block, side, key0, key1, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """out (WORDS, count) int32: bit r % 32 of word r // 32 is set where row r of ``block`` has −1 at that coordinate.

    Packed and made once: in a kernel that needs them tile by tile, every thread that holds a sign of a coordinate
    would run the generator again, and every row block again. ``key0`` and ``key1`` are the key's words as int32.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c0 = index.to(tl.uint32)
    zero = tl.zeros_like(c0)
    k0, k1 = zero + key0.to(tl.uint32, bitcast=True), zero + key1.to(tl.uint32, bitcast=True)
    words = philox4x32(c0, zero, zero + block.to(tl.uint32), zero + side, k0, k1)
    for i in tl.static_range(WORDS):
        at = out + tl.full((), i, tl.int64) * count + index
        tl.store(at, words[i].to(tl.int32, bitcast=True), mask=index < count)


@triton.jit
def signs(words, count, index, ROWS: tl.constexpr):
    """(len(index), ROWS) float32: the signs at ``index``, less than ``count``, from what ``sign_words`` made."""
    row = tl.arange(0, ROWS)[None, :]
    word = tl.load(words + index)[:, None]
    for i in tl.static_range(1, (ROWS + 31) // 32):
        word = tl.where(row < 32 * i, word, tl.load(words + tl.full((), i, tl.int64) * count + index)[:, None])
    return 1.0 - 2.0 * ((word >> (row % 32)) & 1).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "count", "side", "key0", "key1"])
def _sign_matrix(out, rows, count, out_row, side, key0, key1, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out (.., out_row): ±1 where row < rows and column < count, 0 elsewhere; ROWS of the rows of one counter."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * ROWS
    c0 = column.to(tl.uint32)
    zero = tl.zeros_like(c0)
    k0, k1 = zero + key0.to(tl.uint32, bitcast=True), zero + key1.to(tl.uint32, bitcast=True)
    words = philox4x32(c0, zero, zero + (first // 128).to(tl.uint32), zero + side, k0, k1)
    row = first + tl.arange(0, ROWS)
    word = zero[None, :]
    for i in tl.static_range(4):
        word = tl.where((row % 128 // 32 == i)[:, None], words[i][None, :], word)
    bit = (word >> (row % 32).to(tl.uint32)[:, None] & 1).to(tl.float32)
    sign = tl.where((row < rows)[:, None] & (column < count)[None, :], 1.0 - 2.0 * bit, 0.0)
    at = out + row.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(at, sign.to(out.dtype.element_ty), mask=(column < out_row)[None, :])


def fill_signs(out: Tensor, rows: int, count: int, side: int, key: tuple[int, int]) -> None:
    """out: ±1 in its first ``rows`` rows, a multiple of SIGN_ROWS in all, and ``count`` columns; 0 beyond."""
    plan_sign_matrix(out, rows, count, side, key).run(out)


def plan_sign_matrix(out: Tensor, rows: int, count: int, side: int, key: tuple[int, int]) -> Launch:
    key0, key1 = int32_key(key)
    arguments = {
        "out": out,
        "rows": rows,
        "count": count,
        "out_row": out.stride(0),
        "side": side,
        "key0": key0,
        "key1": key1,
        "ROWS": SIGN_ROWS,
        "BLOCK": SIGN_COLUMNS,
    }
    return Launch(_sign_matrix, (ceil_div(out.stride(0), SIGN_COLUMNS), len(out) // SIGN_ROWS), arguments, 4, 1)


def plan_signs(out: Tensor, side: int, key: tuple[int, int], first_block: int = 0) -> list[Launch]:
    """Fills ``out`` (words, count) int32 with signs at a bit each, 32 rows to a word, from block ``first_block`` of
    ROWS_PER_COUNTER rows on."""
    key0, key1 = int32_key(key)
    return [
        Launch(
            sign_words,
            (ceil_div(out.shape[1], SIGN_BLOCK),),
            {
                "out": words,
                "count": out.shape[1],
                "block": block,
                "side": side,
                "key0": key0,
                "key1": key1,
                "WORDS": len(words),
                "BLOCK": SIGN_BLOCK,
            },
            num_warps=4,
            num_stages=1,
        )
        for block, words in enumerate(out.split(ROWS_PER_COUNTER // 32), first_block)
    ]
