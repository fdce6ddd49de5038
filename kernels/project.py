"""project, Sparse: every coordinate is added to random buckets, by a matrix product.

Triton can neither scatter into shared memory nor sort cheaply, and atomics add in the order of arrival. But a bucket
has two digits, bucket = high · LOW + low, and so one row's signed sums are a small matrix

    sums[high, low] = Σ_u (x_u if high_u = high else 0) · (sign_u if low_u = low else 0)

over the entries u: two thin one-hot matrices made in registers and multiplied on tensor cores. The products are exact,
since a factor is ±1 or 0, and the order of the sums is fixed: float32 in slices that follow from D and dim, float64
beyond. It costs 2·dim FLOPs per entry and row, which hide behind the read of the vectors for some hundred buckets and
grow from there; beyond MAX_DIM, sorting (the reference) is expected to win.

A coordinate that is not finite spoils its own row only, but there 0 · ∞ makes NaN of all buckets of its high digit.
Buckets and signs are hashed once for all rows, a chunk of entries at a time, into four bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.kernels._common import PROGRAMS, Launch, ceil_div, unit_stride
from assay.kernels.philox import SPARSE, int32_key, philox4x32
from assay.kernels.slices import plan_sum

MAX_DIM = 1 << 13  # the sums of one row, 128 × 64, fit the registers of a program
CHUNK = 1 << 23  # entries hashed at a time: 32 MiB, which an L2 cache holds
# A slice of the entries has so many for each bucket, at least: fewer would write partial sums as large as what is read.
TERMS = 32

PRODUCT_ROWS = 128  # rows of a matrix product: high digits times rows of the vectors ...
MAX_ROWS = 16  # ... of which there are often no more
WARPS = 8
BLOCK, STAGES = 64, 4  # entries at a time, and times whose reads are in flight
CODE_BLOCK = 256


@triton.jit(do_not_specialize=["count", "first_block", "skip", "dim", "side", "key0", "key1"])
def _codes(out, count, first_block, skip, dim, side, key0, key1, BLOCK: tl.constexpr):
    """out (count,) int32: 2 bucket + (1 for a minus) of the entries from u = 4 first_block + skip on."""
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counter = block + first_block
    c0 = counter.to(tl.uint32)
    zero = tl.zeros_like(c0)
    k0, k1 = zero + key0.to(tl.uint32, bitcast=True), zero + key1.to(tl.uint32, bitcast=True)
    words = philox4x32(c0, (counter >> 32).to(tl.uint32), zero, zero + side, k0, k1)
    for i in tl.static_range(4):
        bucket = ((words[i] >> 1).to(tl.int64) * dim) >> 31
        code = 2 * bucket + (words[i] & 1).to(tl.int64)
        at = 4 * block + i - skip
        tl.store(out + at, code.to(tl.int32), mask=(at >= 0) & (at < count))


@triton.jit
def _add_word(sums, word, high, low, M: tl.constexpr, BLOCK: tl.constexpr):
    """sums (M, LOW) += (rows × high digits, BLOCK) · (BLOCK, LOW), the first made of word (rows, BLOCK)."""
    spread = tl.where(high[None, :, :], word[:, None, :], 0.0).to(low.dtype)
    return tl.dot(tl.reshape(spread, (M, BLOCK)), low, sums, input_precision="ieee")


@triton.jit
def _upper_half(x):
    """The part of a float32 that a bfloat16 holds: by truncation, which overflows nowhere."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


# Not specialised: the sizes that change from batch to batch and help no load.
@triton.jit(do_not_specialize=["rows", "slices", "slice_blocks"])
def _sparse(
    vectors,  # (rows, count / nonzeros), last stride 1
    codes,  # (count,) int32
    partial,  # (slices, rows, dim) float32
    rows,
    row_stride,
    count,
    nonzeros,
    dim,
    slices,  # of the entries ...
    slice_blocks,  # ... of this many blocks
    ROWS: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT: tl.constexpr,  # float32 vectors: as three bfloat16 words each, which add up to them exactly
    WIDEN: tl.constexpr,  # multiply in float32: the interpreter, whose bfloat16 arithmetic is wrong
):
    M: tl.constexpr = ROWS * HIGH
    s = tl.program_id(0) % slices
    row0 = (tl.program_id(0) // slices).to(tl.int64) * ROWS
    row = tl.minimum(row0 + tl.arange(0, ROWS), rows - 1)  # rows past the end read another one and are dropped
    begin = s * slice_blocks * BLOCK
    end = tl.minimum(begin + slice_blocks * BLOCK, count)
    sums = tl.zeros((M, LOW), tl.float32)
    # Stages given here, not to the launch, are for all loads, not only for those that are a product's operands.
    for u0 in tl.range(begin, end, BLOCK, num_stages=STAGES):
        u = u0 + tl.arange(0, BLOCK)
        # Entries past the end read another one, and no high digit is theirs. The remainder keeps what the compiler
        # knows of contiguous columns, a mask would not.
        at = u if EVEN else u % count
        code = tl.load(codes + at)
        x = tl.load(vectors + row[:, None] * row_stride + (at // nonzeros)[None, :])
        sign = (1 - 2 * (code & 1)).to(tl.float32)
        digit = tl.where(u < end, code // (2 * LOW), -1)
        high = digit[None, :] == tl.arange(0, HIGH)[:, None]
        low = tl.where((code // 2 % LOW)[:, None] == tl.arange(0, LOW)[None, :], sign[:, None], 0.0)
        if not WIDEN:
            low = low.to(tl.bfloat16 if SPLIT else vectors.dtype.element_ty)
        if SPLIT:
            first = _upper_half(x)
            second = _upper_half(x - first)
            sums = _add_word(sums, first, high, low, M, BLOCK)
            sums = _add_word(sums, second, high, low, M, BLOCK)
            sums = _add_word(sums, x - first - second, high, low, M, BLOCK)
        else:
            sums = _add_word(sums, x.to(low.dtype), high, low, M, BLOCK)

    m = tl.arange(0, M)
    r = row0 + m // HIGH
    d = (m % HIGH)[:, None] * LOW + tl.arange(0, LOW)[None, :]
    at = partial + ((s.to(tl.int64) * rows + r) * dim)[:, None] + d
    tl.store(at, sums, mask=(r < rows)[:, None] & (d < dim))


def add_sparse(vectors: Tensor, first: int, key: tuple[int, int], dim: int, nonzeros: int, sums: Tensor) -> None:
    """sums (B, dim) float64, contiguous, += the signed sums of vectors (B, n), whose coordinates begin at ``first``."""
    for launches in plan(vectors, first, key, dim, nonzeros, sums, interpret=not vectors.is_cuda):
        for launch in launches:
            launch.run(vectors)


def plan(
    vectors: Tensor, first: int, key: tuple[int, int], dim: int, nonzeros: int, sums: Tensor, *, interpret: bool = False
) -> Iterator[tuple[Launch, Launch, Launch]]:
    """For each chunk of coordinates: the hash, the sums of slices, and their addition. Meta tensors will do."""
    if not 0 < dim <= MAX_DIM:
        raise ValueError(f"project: the kernel takes dim from 1 to {MAX_DIM}, got {dim}")
    vectors = unit_stride(vectors)
    step = max(1, CHUNK // nonzeros)
    for c in range(0, vectors.shape[1], step):
        part = vectors[:, c : c + step]
        codes = part.new_empty(part.shape[1] * nonzeros, dtype=torch.int32)
        launch, partial = plan_sparse(part, codes, dim, nonzeros, interpret)
        yield plan_codes(codes, (first + c) * nonzeros, key, dim), launch, plan_sum(partial, sums)


def plan_codes(codes: Tensor, first: int, key: tuple[int, int], dim: int) -> Launch:
    """Fills ``codes`` with the entries from number ``first`` on."""
    key0, key1 = int32_key(key)
    skip = first % 4
    arguments = {
        "out": codes,
        "count": len(codes),
        "first_block": first // 4,
        "skip": skip,
        "dim": dim,
        "side": SPARSE,
        "key0": key0,
        "key1": key1,
        "BLOCK": CODE_BLOCK,
    }
    return Launch(_codes, (ceil_div(skip + len(codes), 4 * CODE_BLOCK),), arguments, 4, 1)


def plan_sparse(vectors: Tensor, codes: Tensor, dim: int, nonzeros: int, interpret: bool) -> tuple[Launch, Tensor]:
    """The launch and the partial sums it fills, (slices, B, dim)."""
    b, count = len(vectors), len(codes)
    rows, high, low = digits(dim)
    slice_blocks = ceil_div(max(TERMS * dim, ceil_div(count, PROGRAMS)), BLOCK)
    slices = ceil_div(count, slice_blocks * BLOCK)
    partial = vectors.new_empty((slices, b, dim), dtype=torch.float32)
    arguments = {
        "vectors": vectors,
        "codes": codes,
        "partial": partial,
        "rows": b,
        "row_stride": vectors.stride(0),
        "count": count,
        "nonzeros": nonzeros,
        "dim": dim,
        "slices": slices,
        "slice_blocks": slice_blocks,
        "ROWS": rows,
        "HIGH": high,
        "LOW": low,
        "BLOCK": BLOCK,
        "STAGES": STAGES,
        "EVEN": count % BLOCK == 0,
        "SPLIT": vectors.dtype == torch.float32,
        "WIDEN": interpret,
    }
    return Launch(_sparse, (ceil_div(b, rows) * slices,), arguments, WARPS, STAGES), partial


def digits(dim: int) -> tuple[int, int, int]:
    """Rows of the vectors in a product, high digits and low digits, by the sketch's size alone."""
    size = max(16, triton.next_power_of_2(dim))
    high = max(size // 64, min(8, size // 16))
    return min(MAX_ROWS, PRODUCT_ROWS // high), high, size // high
